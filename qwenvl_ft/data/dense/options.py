"""Options of dense captions in a recipe, checked when the recipe is read."""

from dataclasses import dataclass
from functools import cached_property

from qwenvl_ft.data.dense.prompts import DENSE, MODES, SCHEMES, SUMMARY, Prompt, built_in_prompt, read_prompt
from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.recipe.schema import Recipe

SCALES: dict[str, int | None] = {"none": None, "norm100": 100, "norm1000": 1000}
"""emit_norm -> coordinate of the image's right or lower edge in the answer; None keeps pixels."""
GIVEN, READING = ORDERS = ("given", "reading")


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Options for turning records into questions and answers."""

    images_per_user_turn: int = 2
    """Records per group: one user turn asks about them, one JSON object answers."""
    emit_norm: str = "norm1000"
    """Unit of the answer's coordinates: none (pixels), or norm100 or norm1000 (fractions of the image's sides)."""
    scheme: str = "A"
    """Built-in prompts: A explains the format, B also how to order, describe and outline objects."""
    summary_ratio: float | None = None
    """Share of the groups that ask for summaries instead of objects, 0 to 1; None is 0."""
    label_pattern: str = "图片_{i}"
    """Name of the i-th picture of a group, written before its image and used as its key in the answer."""
    object_pattern: str = "object_{i}"
    """Key of a picture's i-th object."""
    object_order: str | None = None
    """given: as in the record. reading: by upper, then left edge, after augmentation. None: given in scheme A, reading
    in scheme B."""
    system: str | None = None
    """Replaces the built-in system prompt for objects: a text, or the path of a .txt file."""
    user: str | None = None
    """Replaces the built-in user prompt for objects, likewise."""
    system_summary: str | None = None
    """Replaces the built-in system prompt for summaries, likewise."""
    user_summary: str | None = None
    """Replaces the built-in user prompt for summaries, likewise."""
    seed: int = 0
    """Seed of grouping, modes and augmentation."""

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
                raise RecipeError(f"data.{name}={getattr(self, name)!r} must contain {{i}} once, for the number.")
        for name in ("system", "user", "system_summary", "user_summary"):
            object.__setattr__(self, name, read_prompt(getattr(self, name), f"prompts.{name}"))

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> "DenseOptions":
        """Take the options from a recipe's ``data`` and ``prompts`` sections.

        Raises:
            RecipeError: an option is invalid, or a prompt's file cannot be read.
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
        """Return the name of a picture in its group; ``number`` counts from 1."""
        return self.label_pattern.replace("{i}", str(number))

    def object_key(self, number: int) -> str:
        """Return the key of an object in its picture; ``number`` counts from 1."""
        return self.object_pattern.replace("{i}", str(number))

    @property
    def reading_order(self) -> bool:
        """Return True if objects are sorted in reading order."""
        return self.object_order == READING or (self.object_order is None and self.scheme == "B")

    @property
    def draws_summaries(self) -> bool:
        """Return True if groups may ask for summaries, so that every record needs one."""
        return bool(self.summary_ratio)

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """Mode -> prompt of its groups."""
        replacements = {DENSE: (self.system, self.user), SUMMARY: (self.system_summary, self.user_summary)}
        prompts = {}
        for mode in MODES:
            prompt = built_in_prompt(
                self.scheme,
                mode,
                emit_norm=self.emit_norm,
                label_pattern=self.label_pattern,
                object_pattern=self.object_pattern,
                reading_order=self.reading_order,
            )
            system, user = replacements[mode]
            prompts[mode] = Prompt(system or prompt.system, user or prompt.user)
        return prompts
