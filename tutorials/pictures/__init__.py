"""Pictures for the tutorials: digits and photographs that packages bring, and data sets that users have."""

from tutorials.pictures.digits import SPLITS, Split, mnist, small_digits
from tutorials.pictures.folders import celeba, imagenet
from tutorials.pictures.idx import full_mnist, read_idx
from tutorials.pictures.photographs import PHOTOGRAPHS, Photograph, photographs
from tutorials.pictures.sources import Crops, Files, Pictures, Stored

__all__ = [
    "PHOTOGRAPHS",
    "SPLITS",
    "Crops",
    "Files",
    "Photograph",
    "Pictures",
    "Split",
    "Stored",
    "celeba",
    "full_mnist",
    "imagenet",
    "mnist",
    "photographs",
    "read_idx",
    "small_digits",
]
