"""Reads DICOM files and slices of NIfTI volumes as images.

DICOM (needs pydicom): stored values become real ones by the file's rescale slope and intercept (or its modality table),
and the first window centre and width that it states are the default window. Files of 8 bits, colour or not, are shown
as they are.

NIfTI (needs nibabel): ``image_frame`` counts axial slices from the feet (0) towards the head, whatever the order of the
stored axes; a fourth axis counts on after the last slice. A slice is shown as radiologists see it, anterior at the top
and the patient's right on the left, which is also how an axial DICOM image is stored. Values have the header's slope
and intercept applied.
"""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.media.high_bit_depth import DeepPixels, UnsupportedError

SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz")
NEEDS = "pip install 'qwenvl_ft[medical]'."


class MedicalFile:
    """An opened DICOM file or NIfTI volume, with the attributes of a PIL image that reading needs."""

    format = ""
    mode = ""
    size = (0, 0)
    """(width, height) in pixels."""
    n_frames = 1
    is_deep = True
    """False if its values are 8 bits and need no conversion."""

    def __init__(self) -> None:
        self._frame: int | None = None

    def __enter__(self) -> "MedicalFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Both packages have closed the file."""

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError
        self._frame = frame

    def tell(self) -> int:
        """Return the number of the frame that is read."""
        return self._frame or 0

    def require_frame(self) -> None:
        """Raise UnsupportedError if the file does not show anything without a choice of frame."""

    def window(self) -> tuple[float, float] | None:
        """Return the (low, high) that the file states."""
        return None

    def pixels(self) -> DeepPixels:
        """Return the values of the chosen frame; values of 8 bits are uint8 and need no conversion."""
        raise NotImplementedError


def opened_medical(source: str | io.BytesIO) -> MedicalFile:
    """Open a DICOM or NIfTI file and read its header.

    Raises:
        UnsupportedError: the package that reads it is not installed, or a NIfTI volume is not one of numbers.
    """
    named = isinstance(source, str) and source.lower().endswith((".nii", ".nii.gz"))
    return NiftiFile(source) if named or _magic(source)[344:347] == b"n+1" else DicomFile(source)


def is_medical(source: str | io.BytesIO, *, by_content: bool = False) -> bool:
    """Return True for a DICOM or NIfTI file, judging by its name or by its first bytes."""
    if not by_content:
        return isinstance(source, str) and source.lower().endswith(SUFFIXES)
    head = _magic(source)
    return head[128:132] == b"DICM" or head[344:347] == b"n+1"


def _magic(source: str | io.BytesIO) -> bytes:
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            head = file.read(352)
            if head.startswith(b"\x1f\x8b"):
                file.seek(0)
                head = gzip.GzipFile(fileobj=file).read(352)
        return head
    head = source.getvalue()
    return gzip.GzipFile(fileobj=io.BytesIO(head)).read(352) if head.startswith(b"\x1f\x8b") else head[:352]


class DicomFile(MedicalFile):
    """A DICOM image; its frames are those of a multi-frame file."""

    format = "DICOM"

    def __init__(self, source: str | io.BytesIO) -> None:
        super().__init__()
        try:
            import pydicom
        except ImportError:
            raise UnsupportedError(f"DICOM files need pydicom: {NEEDS}") from None
        if not isinstance(source, str):
            source.seek(0)
        self._data: Any = pydicom.dcmread(source, defer_size=1024 if isinstance(source, str) else None)
        if "Rows" not in self._data or "PixelRepresentation" not in self._data:
            raise UnsupportedError("it is a DICOM file without an image.")
        self.size = int(self._data.Columns), int(self._data.Rows)
        self.n_frames = int(self._data.get("NumberOfFrames") or 1)
        signed = "int" if self._data.PixelRepresentation else "uint"
        self.mode = f"DICOM {self._data.PhotometricInterpretation} {signed}{self._data.BitsStored}"
        self.is_deep = self._data.SamplesPerPixel == 1 and (self._data.BitsStored > 8 or self._rescales())

    def _rescales(self) -> bool:
        return self._of("RescaleSlope", "PixelValueTransformationSequence", 1) != 1 or (
            self._of("RescaleIntercept", "PixelValueTransformationSequence", 0) != 0
        )

    def _of(self, key: str, sequence: str, default: Any) -> Any:
        """Return a value of the image, or of the chosen frame of an enhanced multi-frame file."""
        if self._data.get(key) is not None:
            return self._data.get(key)
        frames = self._data.get("PerFrameFunctionalGroupsSequence") or []
        groups = [frames[self._frame or 0]] if frames else []
        for group in groups + list(self._data.get("SharedFunctionalGroupsSequence") or []):
            entry = group.get(sequence)
            if entry and entry[0].get(key) is not None:
                return entry[0].get(key)
        return default

    def window(self) -> tuple[float, float] | None:
        """Return (low, high) of the first window that the file states: DICOM PS3.3 C.11.2.1.2."""
        centre, width = (self._of(key, "FrameVOILUTSequence", None) for key in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            return None
        centre, width = (float(each[0] if hasattr(each, "__len__") else each) for each in (centre, width))
        if self._of("VOILUTFunction", "FrameVOILUTSequence", "LINEAR") == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return (centre - width / 2, centre + width / 2) if width > 0 else None

    def pixels(self) -> DeepPixels:
        from pydicom.pixels import apply_modality_lut, pixel_array

        data, index = self._data, self._frame or 0
        values = pixel_array(data, index=index if self.n_frames > 1 else None)
        inverted = data.PhotometricInterpretation == "MONOCHROME1"
        if not self.is_deep:
            if values.dtype != np.uint8:
                raise UnsupportedError(f"its values ({self.mode}) are not supported. Save it as 8-bit colours.")
            return DeepPixels(values, self.mode, inverted=inverted)
        if "ModalityLUTSequence" in data:
            values = apply_modality_lut(values, data)
        else:
            slope = float(self._of("RescaleSlope", "PixelValueTransformationSequence", 1))
            intercept = float(self._of("RescaleIntercept", "PixelValueTransformationSequence", 0))
            values = values * slope + intercept if (slope, intercept) != (1.0, 0.0) else values
        return DeepPixels(values, self.mode, self.window(), inverted)


class NiftiFile(MedicalFile):
    """A NIfTI volume; its frames are axial slices."""

    format = "NIfTI"

    def __init__(self, source: str | io.BytesIO) -> None:
        super().__init__()
        try:
            import nibabel
        except ImportError:
            raise UnsupportedError(f"NIfTI files need nibabel: {NEEDS}") from None
        if isinstance(source, str):
            self._volume: Any = nibabel.load(source)  # type: ignore[attr-defined]
        else:
            data = source.getvalue()
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            self._volume = nibabel.Nifti1Image.from_bytes(data)
        shape, kind = self._volume.shape, self._volume.get_data_dtype()
        if len(shape) not in (2, 3, 4) or kind.kind not in "iuf":
            raise UnsupportedError(
                f"it is a NIfTI volume of shape {shape} and type {kind}, not of numbers in 2 to 4 axes."
            )
        orientation = nibabel.orientations.io_orientation(self._volume.affine)  # type: ignore[attr-defined]
        if np.isnan(orientation).any():
            raise UnsupportedError("its affine does not say which axis is axial.")
        self._axes = [int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3)]
        self._flips = [bool(orientation[axis, 1] != sign) for axis, sign in zip(self._axes, (-1, -1, 1), strict=True)]
        self._sides = (*shape, 1)[:3] if len(shape) == 2 else shape[:3]
        self.size = self._sides[self._axes[0]], self._sides[self._axes[1]]
        self.n_frames = self._sides[self._axes[2]] * (shape[3] if len(shape) == 4 else 1)
        self.mode = f"NIfTI {kind}"

    def require_frame(self) -> None:
        if self._frame is None and self.n_frames > 1:
            raise UnsupportedError(
                f"it is a volume of {self.n_frames} axial slices. Choose one with image_frame, from 0 at the feet, as "
                "a key of the record or of its data set."
            )

    def pixels(self) -> DeepPixels:
        count = self._sides[self._axes[2]]
        time, place = divmod(self._frame or 0, count)
        place = count - 1 - place if self._flips[2] else place
        index: list[Any] = [slice(None)] * 3
        index[self._axes[2]] = slice(place, place + 1)
        shape = self._volume.shape
        index = index[: len(shape)] + ([time] if len(shape) == 4 else [])
        values = np.asanyarray(self._volume.dataobj[tuple(index)]).reshape(
            [1 if axis == self._axes[2] else side for axis, side in enumerate(self._sides)]
        )
        plane = values.transpose(self._axes[1], self._axes[0], self._axes[2])[..., 0]
        return DeepPixels(plane[:: -1 if self._flips[1] else 1, :: -1 if self._flips[0] else 1], self.mode)
