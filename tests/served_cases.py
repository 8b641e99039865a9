"""A server of plain transformers and peft behind the chat API, with nothing of this package, and the check of it."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from qwenvl_ft.cli.main import main

STEPS = 8


class PlainServer:
    """Answers chat requests greedily by plain transformers."""

    def __init__(
        self,
        base,
        adapter=None,
        processor=None,
        *,
        ids=True,
        logprobs=True,
        max_pixels=None,
        video=None,
        maker="vllm",
        thinking=False,
    ):
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
        self.processor = AutoProcessor.from_pretrained(processor or base)
        if max_pixels:
            self.processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": max_pixels}
        self.video = video or {}
        if "max_pixels" in self.video:
            self.processor.video_processor.size = {"shortest_edge": 1024, "longest_edge": self.video["max_pixels"]}
        self.ids, self.logprobs, self.maker, self.thinking, self.asked = ids, logprobs, maker, thinking, []

    def models(self):
        return {"data": [{"id": "tiny", "root": "elsewhere", "owned_by": self.maker}]}

    def chat(self, body):
        """Answer as vLLM does, which takes frames of a video in ``media_io_kwargs``."""
        self.asked.append(body)
        if "media_io_kwargs" in body and (refusal := self.video.get("refuses")):
            raise PermissionError(refusal)
        if "tools" in body and self.maker == "vllm" and body.get("tool_choice", "auto") != "none":
            raise PermissionError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser')
        messages = [
            turn | {"content": [_part(part) for part in turn["content"]], "tool_calls": _calls(turn)}
            for turn in body["messages"]
        ]
        for turn in messages if self.video.get("first") else ():
            turn["content"].sort(key=lambda part: part["type"] == "text")
        videos = [part["video"] for turn in messages for part in turn["content"] if part["type"] == "video"]
        images = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        chosen = {} if self.video.get("ignores") else body.get("media_io_kwargs", {}).get("video", {})
        metadata = [
            {
                "fps": chosen.get("fps", 1.0),
                "frames_indices": list(chosen.get("frames_indices", range(len(frames)))),
                "total_num_frames": len(frames),
            }
            for frames in videos
        ]
        text = self.processor.apply_chat_template(
            messages, tools=body.get("tools"), add_generation_prompt=True, enable_thinking=self.thinking
        )
        media = {"images": images} if images else {}
        if self.video.get("backwards"):
            videos = [frames[::-1].copy() for frames in videos]
        media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if videos else {}
        inputs = self.processor(text=[text], return_tensors="pt", **media)
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            done = self.model.generate(**inputs, max_new_tokens=body["max_tokens"], **settings)
        prompt = inputs["input_ids"][0].tolist()
        new = done.sequences[0, len(prompt) :].tolist()
        rows = [row[0].log_softmax(-1) for row in done.logits]
        tokenizer = self.processor.tokenizer
        stopped = new[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id)
        choice = {
            "message": {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)},
            "finish_reason": "stop" if stopped else "length",
        }
        if self.logprobs:
            entries = [{"logprob": float(row[token])} for row, token in zip(rows, new, strict=True)]
            choice["logprobs"] = {"content": entries}
        reply = {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        if self.ids:
            choice["token_ids"], reply["prompt_token_ids"] = new, prompt
        return reply


def _part(part):
    if part["type"] == "text":
        return part
    kind = part["type"].removesuffix("_url")
    start, _, data = part[part["type"]]["url"].partition("base64,")
    images = [Image.open(io.BytesIO(base64.b64decode(frame))) for frame in data.split(",")]
    assert (kind, start) in {("image", "data:image/png;"), ("video", "data:video/jpeg;")}
    return {"type": kind, kind: images[0] if kind == "image" else np.stack([np.asarray(image) for image in images])}


def _calls(turn):
    """Return the calls of tools with arguments as objects, which servers make of the API's texts."""
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    return [{"function": call | {"arguments": json.loads(call["arguments"])}} for call in calls]


@contextmanager
def serving(server):
    """Serve on a free port of this machine, and yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(server.models())

        def do_POST(self):
            try:
                self._send(server.chat(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            except PermissionError as error:
                self._send({"error": {"message": str(error)}}, 400)

        def _send(self, reply, code=200):
            data = json.dumps(reply).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def check(root, server, capsys, *options, model="run"):
    """Return the exit code of serve-check, and its result."""
    arguments = ["--model", str(root / model), "--data", str(root / "data.jsonl"), "--json", *options]
    with serving(server) as url:
        code = main(["serve-check", "--url", url, "--max-new-tokens", str(STEPS), *arguments])
    found = capsys.readouterr()
    return code, json.loads(found.out) if found.out else found.err
