"""PASCAL VOC: classification, detection and segmentation from transferred layers."""
