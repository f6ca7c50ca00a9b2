"""guidellm: a benchmark of chats, streamed, on the base and on an adapter; every request must succeed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

for model in ("demo", "shout"):
    report = Path(tempfile.mkdtemp()) / "report.json"
    command = [
        Path(sys.executable).with_name("guidellm"),
        "run",
        "--disable-console",
        *("--backend", f"kind=openai_http,target={os.environ['BASE']},model={model}"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=hf_auto,model={os.environ['TOKENIZER']}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--output", f"kind=json,path={report}"),
    ]
    subprocess.run(command, check=True)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (4, 0), requests["errored"]
    assert all(each["output_tokens"] == 8 for each in requests["successful"])
print("ok")
