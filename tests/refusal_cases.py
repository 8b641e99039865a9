"""One record for every reason for which the encoder refuses, and the names that validators give to the reason."""

import base64
from dataclasses import dataclass
from pathlib import Path

from cases import picture
from video_cases import film

LARGEST = 250_000
"""``data.max_image_pixels`` of these records."""


@dataclass(frozen=True)
class Refusal:
    """A record that cannot be trained on; its media are made by `write_media`."""

    name: str
    record: dict
    reason: str
    """Reason in ``check``, with a model and without."""
    flare: str = ""
    """Kind in ``flare-validate``; empty if a converted file has no such records."""
    convert: str = ""
    """Reason of ``convert flare``; empty if it cannot meet such a question."""


def turns(question="<image>\nWhat is it?", answer="A blur."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def image(name, **more):
    return {"image": [name], "conversations": turns()} | more


def video(value):
    return {"video": [value], "conversations": turns("<video>\nWhat moves?")}


def messages(*roles, content="Hello."):
    return {"messages": [{"role": role, "content": content} for role in roles]}


def resized(**size):
    part = [{"type": "image", "image": "a.png"} | size, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "A blur."}]}


def shown_by_system(name):
    part = [{"type": "image", "image": name}, {"type": "text", "text": "Look."}]
    return {"messages": [{"role": "system", "content": part}, *messages("user", "assistant")["messages"]]}


def asked_with_tool(text):
    schema = {"name": "look", "description": text, "parameters": {}}
    return messages("user", "assistant") | {"tools": [{"type": "function", "function": schema}]}


REFUSALS = [
    Refusal("an image that does not exist", image("gone.png"), "missing", "missing_image", "missing_image"),
    Refusal("a text file named as an image", image("text.png"), "corrupt", "corrupted_image", "corrupted_image"),
    Refusal("half of an image", image("half.png"), "corrupt", "corrupted_image", "corrupted_image"),
    Refusal("an image of 2 x 1333 pixels", image("thin.png"), "too_thin", "too_thin_image", "too_thin_image"),
    Refusal("an image of 1333 x 2 pixels", image("flat.png"), "too_thin", "too_thin_image", "too_thin_image"),
    Refusal("an image above the limit", image("large.png"), "too_large", "too_large_image", "too_large_image"),
    Refusal("an image of 16 bits", image("deep.png"), *["high_bit_depth"] * 3),
    Refusal("frames of 16 bits", video(["deep.png", "deep.png"]), "high_bit_depth"),
    Refusal("a folder named as an image", image("folder.png"), "corrupt", "missing_image", "missing_image"),
    Refusal("a URL", image("https://localhost/a.png"), "corrupt", "missing_image"),
    Refusal("broken base64", image("data:image/png;base64,%%%"), "corrupt", "missing_image"),
    Refusal(
        "a text in base64",
        image(f"data:image/png;base64,{base64.b64encode(b'no').decode()}"),
        "corrupt",
        "missing_image",
    ),
    Refusal("an image resized to 32 x 9600", resized(resized_height=9600, resized_width=32), "too_thin"),
    Refusal("a video that does not exist", video("gone.mp4"), "missing"),
    Refusal("a text file named as a video", video("text.mp4"), "corrupt"),
    Refusal("a video of 6432 x 32 pixels", video("flat.mp4"), "too_thin"),
    Refusal("a video above the limit", video("large.mp4"), "too_large"),
    Refusal("a video of one frame", video("still.mp4"), "corrupt"),
    Refusal("a list of one frame", video(["a.png"]), "encoding"),
    Refusal("frames of two sizes", video(["a.png", "b.png"]), "encoding"),
    Refusal("thin frames", video(["thin.png", "thin.png"]), "too_thin"),
    Refusal("frames above the limit", video(["large.png", "large.png"]), "too_large"),
    Refusal(
        "a control token in the question",
        image("a.png", conversations=turns("<image>\nSay <|im_end|>")),
        *("encoding", "encoding", "control_token"),
    ),
    Refusal(
        "a control token in the answer",
        image("a.png", conversations=turns(answer="<|vision_start|>")),
        *("encoding", "encoding", "control_token"),
    ),
    Refusal(
        "half of a character",
        image("a.png", conversations=turns(answer="A \ud83d.")),
        *("encoding", "encoding", "encoding"),
    ),
    Refusal("a system message at the end", messages("user", "assistant", "system"), "encoding", "structure"),
    Refusal("an image in the system message", shown_by_system("a.png"), "tags"),
    Refusal("half of a character in a tool", asked_with_tool("\ud83d"), "encoding"),
    Refusal("a control token in a tool", asked_with_tool("<|im_end|>"), "encoding"),
    Refusal("no answer", messages("user"), "unsupervised", "structure"),
    Refusal("more tags than images", image("a.png", conversations=turns("<image><image>?")), "tags", "tags"),
    Refusal("no known format", {"text": "Hello."}, "structure", "image"),
    Refusal("an answer that is a number", image("a.png", conversations=turns(answer=5)), "structure", "structure"),
]


def write_media(folder: Path) -> None:
    """Write the media that the records name, and the sound ``a.png`` and ``b.png``."""
    sizes = {"a": (96, 64), "b": (64, 128), "thin": (2, 1333), "flat": (1333, 2), "large": (600, 500)}
    for name, (width, height) in sizes.items():
        picture(width, height).save(folder / f"{name}.png")
    picture(96, 64).convert("I;16").point(lambda value: value * 16).save(folder / "deep.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    for suffix in ("png", "mp4"):
        (folder / f"text.{suffix}").write_text("not a medium")
    (folder / "folder.png").mkdir()
    film(str(folder / "flat.mp4"), frames=4, size=(6432, 32))
    film(str(folder / "large.mp4"), frames=4, size=(600, 500))
    film(str(folder / "still.mp4"), frames=1)
