"""What knows tensors, and nothing of panoptic segmentation: convolutions, RoIAlign, resizing,
pasting of masks, argmax."""
