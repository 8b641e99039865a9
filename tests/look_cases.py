"""Valid records of every format, for the tests of what inspects data."""

from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.look.selection import target_recipe


def asked(image, answer="A blur.", question="<image>\nWhat is it?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} | more


def captioned(**more):
    box = {"desc": "box/red", "bbox_2d": [10, 10, 60, 50]}
    return {"images": ["a.png"], "width": 96, "height": 64, "objects": [box]} | more


def grounded(box=(10, 10, 60, 50), **more):
    turns = [{"role": "user", "content": "<image>Find it."}, {"role": "assistant", "content": "<bbox>"}]
    return {"images": ["a.png"], "messages": turns, "objects": {"ref": [], "bbox": [list(box)]}} | more


def sound():
    """Return a valid record of every format, no two of them equal."""
    return [
        asked("a.png", id="first"),
        asked(["a.png", "b.png"], "No.", "<image>\n<image>\nSame?"),
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Where?"}]},
                {"role": "assistant", "content": '[{"bbox_2d": [100, 200, 900, 1000], "label": "blur"}]'},
            ]
        },
        {"conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]},
        captioned(),
    ]


def checked(path, *words, **options):
    """Return the report of ``qwenvl-ft check PATH WORDS``."""
    return check_recipe(target_recipe([str(path), *words]), quiet=True, **options)
