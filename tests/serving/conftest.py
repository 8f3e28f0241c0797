"""A fake server: a tiny random model behind the part of vLLM's HTTP interface that scoring needs."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from laid_eval.models.source import quiet, resolve


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random Llama with SmolLM2's tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("models") / "tiny"
    with quiet():
        LlamaForCausalLM(config).save_pretrained(out)
        AutoTokenizer.from_pretrained(resolve("smollm2").folder).save_pretrained(out)
    return out


class FakeServer:
    """Answers as vLLM does, unless `fail` says otherwise for the number of a request: a status, or a fault by name.

    Faults: `garbage` (no JSON), `empty` (JSON that is no answer), `hang` (no answer in time), `cut` (reads half).
    """

    def __init__(self, folder, by_id=True, longest=2048):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.by_id, self.longest = by_id, longest
        self.requests = []
        self.fail = lambda number: None
        self.scale_out = True
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @torch.inference_mode()
    def logs(self, ids, kept=0):
        """(kept or all, V) log-probabilities."""
        return self.model(torch.tensor([ids]), logits_to_keep=kept).logits[0].log_softmax(-1)

    def name(self, token, body):
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.tokenizer.decode([token])

    def completions(self, body):
        ids = body["prompt"]
        logs = self.logs(ids, kept=0 if body.get("echo") else 1)
        best = int(logs[-1].argmax())
        wanted = body.get("logprob_token_ids") if self.by_id else None
        if body.get("echo"):
            shown = [None] + [float(logs[i - 1, t]) for i, t in enumerate(ids) if i] + [float(logs[-1, best])]
            tops = [None] + [{"top": float(logs[i - 1].max()), "own": v} for i, v in enumerate(shown) if i]
            found = {"tokens": [str(t) for t in [*ids, best]], "token_logprobs": shown, "top_logprobs": tops}
        else:
            chosen = {self.name(t, body): float(logs[-1, t]) for t in wanted or [best]}
            found = {"tokens": [self.name(best, body)], "token_logprobs": [float(logs[-1, best])],
                     "top_logprobs": [chosen]}  # fmt: skip
        text = self.tokenizer.decode([best])
        return ids, {"index": 0, "text": text, "finish_reason": "length", "logprobs": found}

    def generate(self, body):
        ids, wanted = body["token_ids"], body["sampling_params"]["logprob_token_ids"]
        logs = self.logs(ids, kept=1)
        best = int(logs[-1].argmax())
        listed = [best, *wanted][: body["sampling_params"]["logprobs"]]  # as vLLM 0.32 does
        tops = [{"token_id": t, "logprob": float(logs[-1, t]), "rank": 1} for t in dict.fromkeys(listed)]
        content = [{"token_id": best, "logprob": float(logs[-1, best]), "top_logprobs": tops}]
        return ids, {"index": 0, "token_ids": [best], "logprobs": {"content": content}}

    def chat(self, body):
        goes_on = body.get("continue_final_message", False)
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        logs = self.logs(ids, kept=0 if "prompt_logprobs" in body else 1)
        best = int(logs[-1].argmax())
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "x"}}
        more = {}
        if body.get("logprobs"):
            tops = [{"token": self.name(t, body), "logprob": float(logs[-1, t]), "bytes": None}
                    for t in body["logprob_token_ids"]]  # fmt: skip
            first = {"token": self.name(best, body), "logprob": float(logs[-1, best]), "top_logprobs": tops}
            choice["logprobs"] = {"content": [first]}
        if "prompt_logprobs" in body:
            more["prompt_logprobs"] = [None] + [
                {str(t): {"logprob": float(logs[i - 1, t]), "rank": int((logs[i - 1] >= logs[i - 1, t]).sum())}}
                for i, t in enumerate(ids) if i
            ]  # fmt: skip
        return ids, choice, more

    def answer(self, path, body):
        if path.endswith("/chat/completions"):
            ids, choice, more = self.chat(body)
        elif path.endswith("/generate"):
            (ids, choice), more = self.generate(body), {}
        else:
            (ids, choice), more = self.completions(body), {}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [choice],
                "usage": usage, **more}  # fmt: skip

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            def send(self, code, document):
                content = json.dumps(document).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                model = {
                    "id": "tiny",
                    "object": "model",
                    "created": 0,
                    "owned_by": "x",
                    "max_model_len": server.longest,
                }
                if self.path == "/v1/models":
                    self.send(200, {"object": "list", "data": [model]})
                else:
                    self.send(404, {"detail": "Not Found"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, body, self.headers.get("Authorization")))
                    code = server.fail(len(server.requests))
                    if not server.scale_out and self.path.endswith("/generate"):
                        code = 403
                if code == "hang":
                    time.sleep(3)
                elif code == "garbage":
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"<html>")
                elif code == "empty":
                    self.send(200, {"choices": []})
                elif code == "cut":
                    found = server.answer(self.path, body)
                    found["usage"]["prompt_tokens"] //= 2
                    self.send(200, found)
                elif code:
                    self.send(code, {"error": {"message": f"planted failure {code}", "type": "x", "code": code}})
                else:
                    self.send(200, server.answer(self.path, body))

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def make_server(folder):
    """Starts fakes; all are gone afterwards."""
    made = []

    def make():
        made.append(FakeServer(folder))
        return made[-1]

    yield make
    for one in made:
        one.http.shutdown()
        one.http.server_close()


@pytest.fixture
def server(make_server):
    return make_server()
