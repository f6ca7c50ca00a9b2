"""aiperf: chats and completions, streamed, on an adapter; every request must succeed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

for kind in ("chat", "completions"):
    folder = Path(tempfile.mkdtemp())
    command = [
        Path(sys.executable).with_name("aiperf"),
        *("profile", "-m", "shout", "--url", os.environ["BASE"], "--endpoint-type", kind, "--streaming"),
        *("--tokenizer", os.environ["TOKENIZER"], "--request-count", "4", "--concurrency", "2"),
        *("--synthetic-input-tokens-mean", "16", "--output-tokens-mean", "8", "--extra-inputs", "ignore_eos:true"),
        *("--output-artifact-dir", str(folder), "--ui", "simple"),
    ]
    # Told to stay offline, it takes no folder for a tokenizer.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(command, check=True, env=environment)
    lines = (folder / "profile_export.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4
    assert not any(record.get("error") for record in records), records
print("ok")
