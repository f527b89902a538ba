"""The stages of a training, one file each: pretrain, adapt, sft, align."""
