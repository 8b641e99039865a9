"""DICOM files and NIfTI slices become the images that pydicom, nibabel and numpy give by hand."""

import io
import json

import numpy as np
import pytest

from qwenvl_ft.data.media.high_bit_depth import HighBitDepthError
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.data.media.reading import Reading
from qwenvl_ft.errors import DataError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(3)
STORED = RNG.integers(0, 4096, (2, 21, 37)).astype(np.uint16)


def dicom(values, **tags):
    """Return a DICOM file of grey frames [F, H, W], or colours [H, W, 3]."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    colour = values.shape[-1] == 3
    data.Rows, data.Columns = values.shape[:2] if colour else values.shape[1:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    elif len(values) > 1:
        data.NumberOfFrames = len(values)
    bits = 8 * values.dtype.itemsize
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for key, value in tags.items():
        setattr(data, key, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def shown(value, method="window", window=None, frame=None):
    policy = MediaPolicy(reading=Reading(method, window, frame))
    image = open_image(value, policy)
    assert image.size[::-1] == image_size(value, policy)
    return np.asarray(image)


def formula(values, low, high):
    return np.floor(255 * (np.clip(values.astype(np.float64), low, high) - low) / (high - low) + 0.5).astype(np.uint8)


CT = dicom(STORED[:1], RescaleSlope="2", RescaleIntercept="-1024", WindowCenter=["40", "700"], WindowWidth=["400", "9"])
HOUNSFIELD = STORED[0] * 2.0 - 1024


@pytest.mark.parametrize("name", ["scan.dcm", "IM0001"])
def test_a_ct_image_is_shown_in_the_window_that_it_states(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(CT)
    for value in (str(path), CT):
        grey = shown(value)[..., 0]
        assert np.array_equal(grey, formula(HOUNSFIELD, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2))
        assert np.array_equal(shown(value, window=(-160.0, 240.0))[..., 0], formula(HOUNSFIELD, -160, 240))
    exact = dicom(STORED[:1], WindowCenter="900", WindowWidth="200", VOILUTFunction="LINEAR_EXACT")
    assert np.array_equal(shown(exact)[..., 0], formula(STORED[0], 800, 1000))


def test_pydicom_itself_gives_the_same_window_to_a_rounding():
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    data = pydicom.dcmread(io.BytesIO(CT))
    reference = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data, index=0)
    reference = (reference - reference.min()) / np.ptp(reference) * 255
    assert np.abs(reference - shown(CT)[..., 0]).max() <= 0.5 + 1e-9


def test_a_ct_image_is_an_error_by_default_that_names_its_own_window():
    with pytest.raises(HighBitDepthError, match=r"mode DICOM MONOCHROME2 uint16.*own window is -160 to 239\. Set data"):
        image_size(CT, MediaPolicy())


def test_low_values_are_bright_in_monochrome1():
    inverted = dicom(STORED[:1], PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(shown(inverted, "minmax"), 255 - shown(dicom(STORED[:1]), "minmax"))


def test_a_frame_of_a_multi_frame_file_is_chosen():
    for frame in range(2):
        grey = shown(dicom(STORED), window=(0.0, 4095.0), frame=frame)[..., 0]
        assert np.array_equal(grey, formula(STORED[frame], 0, 4095))
    with pytest.raises(DataError, match="has no frame image_frame=2: it has 2"):
        shown(dicom(STORED), window=(0.0, 4095.0), frame=2)


def test_8_bit_files_need_no_setting():
    colour = RNG.integers(0, 256, (21, 37, 3)).astype(np.uint8)
    assert np.array_equal(shown(dicom(colour), "error"), colour)
    grey = RNG.integers(0, 256, (1, 21, 37)).astype(np.uint8)
    assert np.array_equal(shown(dicom(grey), "error")[..., 0], grey[0])


VOLUME = RNG.integers(-1000, 3000, (5, 6, 7)).astype(np.int16)
"""Axes: right to left, posterior to anterior, feet to head if the affine is the identity."""


def nifti(values, codes="RAS", path=None, **header):
    """Return a file whose voxels are stored along the axes ``codes``, of values given along RAS axes."""
    image = nibabel.Nifti1Image(values, np.eye(4))
    target = nibabel.orientations.axcodes2ornt(codes)
    stored = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    assert nibabel.aff2axcodes(stored.affine) == tuple(codes)
    if header:
        stored.header.set_slope_inter(**header)
    if path is None:
        return stored.to_bytes()
    nibabel.save(stored, path)
    return str(path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SRP", "PIR"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ""])
def test_a_slice_is_axial_from_the_feet_whatever_the_order_of_the_axes(tmp_path, codes, suffix):
    value = nifti(VOLUME, codes, tmp_path / f"v{suffix}" if suffix else None)
    for frame in (0, 3, 6):
        by_hand = np.array([[VOLUME[4 - x, 5 - y, frame] for x in range(5)] for y in range(6)])
        grey = shown(value, window=(-160.0, 240.0), frame=frame)[..., 0]
        assert np.array_equal(grey, formula(by_hand, -160, 240))
    with pytest.raises(DataError, match="has no frame image_frame=7: it has 7"):
        shown(value, "minmax", frame=7)


def test_a_volume_without_a_chosen_slice_is_an_error_before_anything_is_decoded():
    with pytest.raises(
        DataError, match=r"image of \d+ bytes cannot be read: it is a volume of 7 axial slices\. Choose"
    ):
        image_size(nifti(VOLUME), MediaPolicy(reading=Reading("minmax")))


def test_a_fourth_axis_counts_on_after_the_last_slice():
    series = np.stack([VOLUME, VOLUME[::-1]], axis=-1)
    value = nibabel.Nifti1Image(series, np.eye(4)).to_bytes()
    assert np.array_equal(shown(value, "minmax", frame=9), shown(nifti(VOLUME[::-1]), "minmax", frame=2))


def test_a_headers_slope_and_intercept_are_applied():
    value = nibabel.Nifti1Image(VOLUME, np.eye(4))
    value.header.set_slope_inter(2.0, -5.0)
    scaled = nibabel.Nifti1Image.from_bytes(value.to_bytes()).get_fdata()
    assert not np.array_equal(scaled, VOLUME)
    grey = shown(value.to_bytes(), window=(-200.0, 300.0), frame=2)[..., 0]
    assert np.array_equal(grey, formula(scaled[::-1, ::-1, 2].T, -200, 300))


def test_a_file_that_is_neither_is_still_reported_as_no_image(tmp_path):
    (tmp_path / "x.dcm").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"x\.dcm"):
        image_size(str(tmp_path / "x.dcm"), MediaPolicy())
    with pytest.raises(DataError, match="is not an image that can be read"):
        image_size(b"nothing at all", MediaPolicy())
