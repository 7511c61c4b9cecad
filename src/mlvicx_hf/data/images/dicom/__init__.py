"""DICOM files: their attributes, their frame, their grey."""

from mlvicx_hf.common.errors import require

require("a DICOM file", "dicom", "pydicom")  # here, so that every module below may import it
