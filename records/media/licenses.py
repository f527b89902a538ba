"""Whose the embedded sets of images and sounds are; read without loading any of them."""

# By set: license and source.
LICENSES = {
    "digits": ("CC-BY-4.0", "UCI 80, Optical Recognition of Handwritten Digits, with scikit-learn (BSD-3-Clause)"),
    "shapes": ("Apache-2.0", "drawn by deepseek-moe, synthetic"),
    "tones": ("Apache-2.0", "computed by deepseek-moe, synthetic"),
    "words": ("not stated", "spoken by espeak-ng (a GPL-3.0 program), synthetic"),
}
