"""lm-eval: log-likelihoods and generation over completions, with the server's tokenizer and without, and over chats."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.api_models import TemplateAPI  # noqa: F401
from lm_eval.tasks import TaskManager

BASE, MODEL = os.environ["BASE"], os.environ.get("TOKENIZER", "")
os.environ.setdefault("OPENAI_API_KEY", "none")
QUESTIONS = [
    {"question": "What colour is the sky?", "choices": [" The sky is blue.", " Le ciel est vert."], "gold": 0},
    {"question": "What does the cat say?", "choices": [" Le chien fait ouaf.", " The cat says meow."], "gold": 1},
]
CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]|trim}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""

folder = Path(tempfile.mkdtemp())
data = folder / "questions.jsonl"
data.write_text("\n".join(json.dumps(each) for each in QUESTIONS))
(folder / "colours.yaml").write_text(CHOICE.format(data=data))
(folder / "words.yaml").write_text(WORDS.format(data=data))


def evaluated(kind: str, tasks: list[str], **arguments: object) -> dict:
    url = BASE + ("/v1/chat/completions" if "chat" in kind else "/v1/completions")
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args={"model": "demo", "base_url": url, "max_retries": 1, "max_length": 512, **arguments},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template="chat" in kind,
        bootstrap_iters=0,
    )
    return found["results"]


ways = {
    "remote tokenizer": {"tokenizer_backend": "remote"},
    "own tokenizer": {"tokenizer_backend": "huggingface", "tokenizer": MODEL},
    "own tokenizer, texts": {"tokenizer_backend": "huggingface", "tokenizer": MODEL, "tokenized_requests": False},
}
accuracies = {}
for way, arguments in ways.items():
    results = evaluated("local-completions", ["colours", "words"], num_concurrent=2, **arguments)
    accuracies[way] = results["colours"]["acc,none"]
assert len(set(accuracies.values())) == 1, accuracies
for model, expected in (("demo", 1.0), ("shout", 0.0)):
    results = evaluated("local-chat-completions", ["words"], tokenizer_backend=None, model=model)
    assert results["words"]["exact_match,none"] == expected, (model, results)
print("ok")
