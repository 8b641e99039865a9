"""Dense-caption records, read one by one; in training they are read in groups instead (data/dense)."""

from collections.abc import Mapping
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Source
from qwenvl_ft.data.dense.compose import dense_conversation
from qwenvl_ft.data.dense.dense_record import matches, read_dense_record
from qwenvl_ft.data.dense.options import DenseOptions

SINGLE_RECORD = DenseOptions(images_per_user_turn=1)


def read(record: Mapping[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Return a conversation that asks for the objects of one record, with the default options.

    Raises:
        DataError: the record is malformed.
    """
    return dense_conversation([read_dense_record(record, source, media_root)], SINGLE_RECORD)


__all__ = ["matches", "read"]
