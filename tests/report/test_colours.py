"""The colours of figures: apart for every eye, and from paper."""

import itertools

import numpy as np
import pytest

from kvjax.report.figures import compare

APART = 17.0  # in CIELAB; 2.3 is a just noticeable difference


def linear(colour: str) -> np.ndarray:
    """Red, green and blue of a hexadecimal colour as light."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


# Machado, Oliveira and Fernandes 2009, severity 1, of linear light.
SEEN = {
    "by most": np.eye(3),
    "without red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB of linear light, under D65."""
    xyz = TO_XYZ @ np.clip(light, 0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN)
def test_colours_are_apart_for_every_eye(eye):
    colours = [*compare.COLOURS, compare.REFERENCE]
    seen = {c: lab(np.array(SEEN[eye]) @ linear(c)) for c in colours}
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= APART, (one, other)
    white = lab(np.ones(3))
    for colour in colours:  # and lines of them are seen on paper
        assert np.linalg.norm(seen[colour] - white) >= 2 * APART, colour
