"""GenEval 2: which tokens count, both means, and the official files."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.benchmarks.geneval2 import AM, GM, GenEval2, accepted
from flowgrpo.bench.run import Part, import_results, score_folder
from tests import zoo
from tests.stub_vlm import Question, Reply, Stub, said

RECORDS = [
    {"prompt": "two cats", "atom_count": 3, "skills": ["count", "object", "attribute"],
     "vqa_list": [["How many cats?", "two"], ["Are there cats?", "Yes"], ["Is it red?", "Yes"]]},
    {"prompt": "a dog", "atom_count": 1, "skills": ["object"], "vqa_list": [["Is there a dog?", "Yes"]]},
]  # fmt: skip


@pytest.fixture
def benchmark(tmp_path: Path) -> GenEval2:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    made = load_benchmark(
        "geneval2", {"data_file": str(file), "any_data": True, "judge_model": "tiny"}
    )
    assert isinstance(made, GenEval2)
    for i in range(2):
        path = tmp_path / "images" / f"0000{i}_0.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (56, 56), (90 * i, 30, 60)).save(path)
    return made


def answer(question: Question) -> Reply:
    assert question.text.endswith("? Answer in one word.")
    assert question.request["max_completion_tokens"] == 1
    if "many" in question.text:
        return said("2", {"2": 0.4, " two": 0.2, "Two": 0.1, "2 ": 0.05, "to": 0.05, " ": 0.2})
    if "red" in question.text:
        return said("No", {"No": 0.9, "YES": 0.1})
    return said("Yes", {"Yes": 0.5, "\u0120yes": 0.25, "yesterday": 0.25})


def values(result: dict) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


def test_both_means_and_the_tokens_that_count(benchmark: GenEval2, tmp_path: Path) -> None:
    out = tmp_path / "out"
    from dataclasses import replace

    with Stub(answer) as stub:
        served = replace(benchmark, judge_url=stub.url)
        result = score_folder(out, served, Part(), "mine", tmp_path / "images")
    assert len(stub.questions) == 4
    two, yes = 0.7, 0.75
    assert values(result) == {
        GM: pytest.approx(100 * (0 + yes) / 2),
        AM: pytest.approx(100 * ((two + yes + 0) / 3 + yes) / 2, abs=1e-4),
        "AM, count": pytest.approx(100 * two),
        "AM, object": pytest.approx(100 * yes),
        "AM, attribute": 0.0,
        "GM, 1 atom": pytest.approx(100 * yes),
        "GM, 3 atoms": 0.0,
    }
    assert result["title"] == "GenEval 2 (tiny, endpoint)"
    assert any("non-commercial" in w for w in result["warnings"])
    assert any("20 most likely" in w for w in result["warnings"])
    images = json.loads((out / "official" / "images.json").read_text())
    assert {k: Path(v).name for k, v in images.items()} == {
        "two cats": "00000_0.png",
        "a dog": "00001_0.png",
    }
    back = import_results(tmp_path / "back", benchmark, out / "official" / "scores.json", "mine")
    assert values(back) == values(result)
    (tmp_path / "scores.json").write_text("[[1.0], [1.0]]")
    with pytest.raises(BenchError, match="1 scores for the 3 questions of prompt 00000"):
        import_results(tmp_path / "x", benchmark, tmp_path / "scores.json", "mine")


def test_a_judge_that_runs_here_uses_all_probabilities(benchmark: GenEval2, tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = zoo.save_qwen25_vl(tmp_path / "judge", ["Yes", "yes", "two", "2"])
    local = replace(benchmark, judge_model=str(folder), dtype="float32", device="cpu")
    result = score_folder(tmp_path / "out", local, Part(), "mine", tmp_path / "images")
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    atoms: list[list[float]] = []
    for i, record in enumerate(RECORDS):
        atoms.append([])
        for question, right in record["vqa_list"]:
            content = [
                {"type": "image"},
                {"type": "text", "text": f"{question} Answer in one word."},
            ]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            image = Image.open(tmp_path / "images" / f"0000{i}_0.png")
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            output = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            shares = output.logits[0][0].softmax(-1)
            forms = ["Yes", "yes"] if right == "Yes" else ["two", "2"]
            ids = [processor.tokenizer.convert_tokens_to_ids(f) for f in forms]
            atoms[-1].append(float(shares[ids].sum()))
    expected = sum(math.prod(a) ** (1 / len(a)) for a in atoms) / 2
    assert values(result)[GM] == pytest.approx(100 * expected, rel=1e-4)
    assert values(result)[AM] == pytest.approx(
        100 * sum(sum(a) / len(a) for a in atoms) / 2, rel=1e-4
    )
    assert expected > 0
    assert torch.is_tensor(shares)


def test_accepted_forms() -> None:
    assert accepted("Yes") == ("yes", "Yes")
    assert accepted("two") == ("two", "Two", "2")
    with pytest.raises(BenchError, match=r"geneval2_data\.jsonl.*non-commercial"):
        GenEval2().entries()
