"""Fine-tuning of an encoder on labelled images: classification and segmentation."""
