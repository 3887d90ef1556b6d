"""The judge's official instructions, read from a benchmark's own source, which is never run."""

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowgrpo.bench.base import BenchError


@dataclass(frozen=True)
class Wording:
    """Instructions to a judge.

    Attributes:
        template: With fields in braces.
        system: The system message; empty for none.
        sha256: Of template and system message.
    """

    template: str
    system: str
    sha256: str

    @classmethod
    def read(cls, path: Path, function: str, fields: Mapping[str, str]) -> "Wording":
        """Find the messages that a function of an official script builds.

        The function returns chat messages; its one f-string is the question, and a constant text
        before it in a message with the role ``system`` is the system message.

        Args:
            path: The script.
            function: The name of the function.
            fields: Expressions in the f-string, as source, -> names of the fields.

        Raises:
            BenchError: If it is not there, or the f-string has other expressions.
        """
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise BenchError(f"judge_prompt: {path} cannot be read: {error}") from error
        functions = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function
        ]
        questions = [n for f in functions[:1] for n in ast.walk(f) if isinstance(n, ast.JoinedStr)]
        questions = [q for q in questions if _expressions(q) >= set(fields)]
        if len(questions) != 1:
            raise BenchError(
                f"judge_prompt: {path} has no function {function} with a question about "
                f"{', '.join(fields.values())}: give the official script of this version"
            )
        parts: list[str] = []
        for value in questions[0].values:
            if isinstance(value, ast.Constant):
                parts.append(str(value.value).replace("{", "{{").replace("}", "}}"))
            elif isinstance(value, ast.FormattedValue):
                expression = ast.unparse(value.value)
                if expression not in fields:
                    raise BenchError(f"judge_prompt: {path}: unknown expression {expression}")
                parts.append("{" + fields[expression] + "}")
        template, system = "".join(parts), _system(functions[0])
        digest = hashlib.sha256(f"{system}\n{template}".encode()).hexdigest()
        return cls(template, system, digest)

    def fill(self, **values: str) -> str:
        """The question with its fields filled in."""
        return self.template.format(**values)


def _expressions(node: ast.JoinedStr) -> set[str]:
    return {ast.unparse(v.value) for v in node.values if isinstance(v, ast.FormattedValue)}


def _system(function: ast.FunctionDef) -> str:
    """The text of the message whose role is ``system``."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Dict):
            continue
        table = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}  # fmt: skip
        role = table.get("role")
        if isinstance(role, ast.Constant) and role.value == "system":
            texts = [
                str(n.value)
                for n in ast.walk(table["content"])
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            # The content is a text, or a list of parts {"type": "text", "text": ...}.
            return max(texts, key=len, default="")
    return ""
