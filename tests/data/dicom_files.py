"""DICOM files of every transfer syntax, made in memory."""

import io
import tempfile
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import compress
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
BY_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    JPEGLSNearLossless: gdcm.TransferSyntax.JPEGLSNearLossless,
}
LOSSY = (JPEGBaseline8Bit, JPEG2000)
SYNTAXES = (*NATIVE, RLELossless, *BY_GDCM, JPEGBaseline8Bit, JPEG2000Lossless, JPEG2000)
NAME = "Quartermaine^Philippa"  # of a patient; must never be seen


def dataset(pixels: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **attributes: Any) -> Dataset:
    """A radiograph of these stored values [H, W] or [H, W, 3], uncompressed; attributes may add to it or differ."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1")
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = UID("1.2.3.4")
    made.SpecificCharacterSet, made.Modality = "ISO_IR 100", "CR"
    made.PatientName, made.PatientID, made.PatientBirthDate = NAME, NAME.upper(), "19610203"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    made.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    made.HighBit = attributes.get("HighBit", made.BitsStored - 1)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    made.PixelData = content + bytes(len(content) % 2)
    made["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    return made


def written(made: Dataset) -> bytes:
    """The file of a dataset, in the transfer syntax that it names."""
    syntax, buffer = made.file_meta.TransferSyntaxUID, io.BytesIO()
    made.save_as(
        buffer,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        enforce_file_format=True,
    )
    return buffer.getvalue()


def encapsulated(made: Dataset, frame: bytes, syntax: UID, **options: Any) -> Dataset:
    """The same with a compressed frame instead of its pixels."""
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([frame], **options)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return made


def dicom(pixels: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **attributes: Any) -> bytes:
    """A whole file of these stored values in a transfer syntax."""
    if syntax in NATIVE:
        return written(dataset(pixels, syntax, **attributes))
    made = dataset(pixels, **attributes)
    if syntax == RLELossless:
        compress(made, RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        return written(made)
    if syntax in BY_GDCM:
        return by_gdcm(written(made), BY_GDCM[syntax])
    buffer = io.BytesIO()
    if syntax == JPEGBaseline8Bit:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    else:
        irreversible = syntax == JPEG2000
        Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=irreversible)
    return written(encapsulated(made, buffer.getvalue(), syntax))


def by_gdcm(content: bytes, syntax: int) -> bytes:
    """The same file in another transfer syntax."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_bytes(content)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(target))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return target.read_bytes()
