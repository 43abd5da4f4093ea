"""Sizes of images and latents: an integer for a square, else [height, width]. So configs and manifests store them."""


def pair(size):
    """Return (height, width) of a size."""
    return (size, size) if isinstance(size, int) else tuple(size)


def size_of(height, width):
    """Return the size of so many rows and columns."""
    return height if height == width else [height, width]


def scaled(size, up=1, down=1):
    """Return a size whose sides are multiplied by `up`, and divided by `down` without remainder."""
    return size_of(*(side * up // down for side in pair(size)))


def is_size(value):
    """Return whether a value of a JSON file is a size."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side > 0 for side in sides)


def size_name(size):
    """Return a size as --image-size takes it: 64, or 64x96 of 64 rows and 96 columns."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))
