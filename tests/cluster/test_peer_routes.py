"""vLLM's routes beside OpenAI's."""

from __future__ import annotations

from typing import Any

from lorafleet.cluster.http.auth import Keys
from tests.cluster.serving import BASE_ID, Service, serving


def test_health_and_version_need_no_key() -> None:
    with serving(Service(keys=Keys(api_keys=("secret",)))) as service, service.http() as http:
        for response in (http.get("/health"), http.get("/ping"), http.post("/ping")):
            assert (response.status_code, response.content) == (200, b"")
        assert set(http.get("/version").json()) == {"version"}
        assert http.post("/tokenize", json={"prompt": "a"}).status_code == 401
        service.waits_for = "0 of 2 workers are up"
        assert http.get("/health").status_code == 503


def test_tokenize_is_the_tokenizers(shared_service: Service) -> None:
    tokenizer = shared_service.prompts.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": "Hello"}]
    with shared_service.http() as http:
        for adds_special in (True, False):
            body = {"model": "shout", "prompt": "Hello wörld", "add_special_tokens": adds_special}
            reply = http.post("/tokenize", json=body | {"return_token_strs": True}).json()
            wanted = tokenizer("Hello wörld", add_special_tokens=adds_special)["input_ids"]
            assert (reply["tokens"], reply["count"]) == (wanted, len(wanted))
            assert reply["token_strs"] == tokenizer.convert_ids_to_tokens(wanted)
            assert reply["max_model_len"] == shared_service.prompts.max_model_len
            back = http.post("/detokenize", json={"model": BASE_ID, "tokens": wanted}).json()
            assert back == {"prompt": tokenizer.decode(wanted)}
        chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat == tokenizer(text, add_special_tokens=False)["input_ids"]
        said = {"role": "assistant", "content": [{"type": "text", "text": "Well,"}, {"type": "text", "text": "no"}]}
        for more in (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
            {"chat_template_kwargs": {"x": 1}},
            {"add_generation_prompt": False},
            {"continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": True},
        ):
            asked: dict[str, Any] = {"messages": [*messages, said], **more}
            told = http.post("/tokenize", json=asked)
            asked |= {"model": BASE_ID, "return_token_ids": True, "max_tokens": 1}
            assert told.json()["tokens"] == http.post("/v1/chat/completions", json=asked).json()["prompt_token_ids"]
        assert http.post("/tokenize", json={"model": "nobody", "prompt": "a"}).status_code == 404
        empty = http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
        assert (empty["tokens"], empty["count"]) == ([], 0)
        for wrong in ({}, {"messages": list[str]()}, {"prompt": "a", "messages": messages}):
            assert http.post("/tokenize", json=wrong).status_code == 400
        assert http.post("/detokenize", json={"tokens": [10**9]}).json()["error"]["code"] == "invalid_token_id"
        info = http.get("/tokenizer_info").json()
        assert (info["tokenizer_class"], info["chat_template"]) == (type(tokenizer).__name__, tokenizer.chat_template)
        assert (info["bos_token"], info["eos_token"]) == (tokenizer.bos_token, tokenizer.eos_token)
        assert info["model_max_length"] == 512
        assert not any(name.endswith(("file", "path")) for name in info)
        assert all(card["max_model_len"] == 512 for card in http.get("/v1/models").json()["data"])
