"""Names of prompt sources, for code that has to tell them from prompts without reading them."""

HUB = "hf:"
"""What the name of a Hugging Face dataset begins with: ``hf:owner/name:split`` or ``hf:folder``."""
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
"""Endings of prompt files."""


def names_prompts(text: str) -> bool:
    """Whether a text is the name of a prompt file or of a dataset, and not a prompt."""
    return text.startswith(HUB) or text.endswith(SUFFIXES)
