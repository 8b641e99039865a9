"""What a recipe decides about dense captions, checked when it is read."""

from dataclasses import dataclass
from functools import cached_property

from qwenvl_ft.data.dense.prompts import DENSE, MODES, SCHEMES, SUMMARY, Prompt, built_in, own_prompt
from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.recipe.schema import Recipe

SCALES: dict[str, int | None] = {"none": None, "norm100": 100, "norm1000": 1000}
"""emit_norm -> what the image's far side becomes in the answer; None leaves pixels."""
GIVEN, READING = ORDERS = ("given", "reading")


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """How records become questions and answers."""

    images_per_user_turn: int = 2
    """Records in a group: asked about in one user turn, answered in one JSON object."""
    emit_norm: str = "norm1000"
    """Unit of the answer's coordinates: none (pixels), norm100 or norm1000 (of the image's sides)."""
    scheme: str = "A"
    """Built-in prompts: A says the format, B also how to order, word and outline."""
    summary_ratio: float | None = None
    """Share of the groups that are asked for summaries instead of objects, 0 to 1; None is 0."""
    label_pattern: str = "图片_{i}"
    """Name of the i-th picture of a group: written before its image, and its key in the answer."""
    object_pattern: str = "object_{i}"
    """Key of a picture's i-th object."""
    object_order: str | None = None
    """given: as in the record. reading: by upper, then left edge, after augmentation. None: A given, B reading."""
    system: str | None = None
    """Instead of the built-in system prompt of objects: a text, or the path of a .txt file."""
    user: str | None = None
    """Instead of the built-in user prompt of objects; likewise."""
    system_summary: str | None = None
    """Instead of the built-in system prompt of summaries; likewise."""
    user_summary: str | None = None
    """Instead of the built-in user prompt of summaries; likewise."""
    seed: int = 0
    """Of grouping, modes and augmentation."""

    def __post_init__(self) -> None:
        if self.images_per_user_turn < 1:
            raise RecipeError(f"data.images_per_user_turn={self.images_per_user_turn} must be 1 or more.")
        if self.seed < 0:
            raise RecipeError(f"data.seed={self.seed} must be 0 or more.")
        if self.summary_ratio is not None and not 0 <= self.summary_ratio <= 1:
            raise RecipeError(f"data.summary_ratio={self.summary_ratio} must be between 0 (objects) and 1 (summaries).")
        if self.emit_norm not in SCALES:
            raise unknown_name("data.emit_norm", self.emit_norm, SCALES)
        object.__setattr__(self, "scheme", self.scheme.upper())
        if self.scheme not in SCHEMES:
            raise unknown_name("prompts.scheme", self.scheme, SCHEMES)
        if self.object_order not in (None, *ORDERS):
            raise unknown_name("data.object_order", str(self.object_order), ORDERS)
        for name in ("label_pattern", "object_pattern"):
            if getattr(self, name).count("{i}") != 1:
                raise RecipeError(f"data.{name}={getattr(self, name)!r} must hold {{i}} once: the number goes there.")
        for name in ("system", "user", "system_summary", "user_summary"):
            object.__setattr__(self, name, own_prompt(getattr(self, name), f"prompts.{name}"))

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> "DenseOptions":
        """What a recipe's ``data`` and ``prompts`` say.

        Raises:
            RecipeError: a prompt's file cannot be read, or a pattern has no number.
        """
        data, prompts = recipe.data, recipe.prompts
        return cls(
            images_per_user_turn=data.images_per_user_turn,
            emit_norm=data.emit_norm,
            summary_ratio=data.summary_ratio,
            label_pattern=data.label_pattern,
            object_pattern=data.object_pattern,
            object_order=data.object_order,
            scheme=prompts.scheme,
            system=prompts.system,
            user=prompts.user,
            system_summary=prompts.system_summary,
            user_summary=prompts.user_summary,
            seed=seed,
        )

    def label(self, number: int) -> str:
        """Name of a picture in its group, counted from 1."""
        return self.label_pattern.replace("{i}", str(number))

    def object_key(self, number: int) -> str:
        """Key of an object in its picture, counted from 1."""
        return self.object_pattern.replace("{i}", str(number))

    @property
    def reading_order(self) -> bool:
        """Whether objects are put in reading order."""
        return self.object_order == READING or (self.object_order is None and self.scheme == "B")

    @property
    def draws_summaries(self) -> bool:
        """Whether a group may be asked for summaries, so that every record needs one."""
        return bool(self.summary_ratio)

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """Mode -> what its groups are told."""
        own = {DENSE: (self.system, self.user), SUMMARY: (self.system_summary, self.user_summary)}
        told = {}
        for mode in MODES:
            prompt = built_in(
                self.scheme,
                mode,
                emit_norm=self.emit_norm,
                label_pattern=self.label_pattern,
                object_pattern=self.object_pattern,
                reading_order=self.reading_order,
            )
            system, user = own[mode]
            told[mode] = Prompt(system or prompt.system, user or prompt.user)
        return told
