"""From a saliency map to a coarse mask, and from that to the boxes and points that SAM is asked with (MedCLIP-SAMv2).

Maps are numpy arrays [H, W] with values from 0 to 1, masks [H, W] bool; places are (x, y) in pixels. Two readings
exist: paper v4 takes Otsu's threshold and keeps the components of highest mean saliency; the released code clusters
grey values into two and keeps the largest components. Both minimise the variance within the two sides, so the masks
differ by resampling and by which components are kept. Source: HealthX-Lab/MedCLIP-SAMv2 @07047e3,
postprocessing/postprocess_saliency_maps.py and segment-anything/prompt_sam.py.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

METHODS = ("otsu", "two_means", "threshold")
SIDE = 256  # pixels a side on which the released code clusters
EIGHT = np.ones((3, 3))  # pixels that touch at a corner are connected


def coarse_mask(saliency: np.ndarray, method: str = "otsu", components: int | None = 1) -> np.ndarray:
    """Clean a saliency map up to a mask: its most confident components with Otsu, else its largest; all with None.

    Raises ValueError for an unknown method, a map that is flat or not between 0 and 1, and when nothing is left.
    """
    if method not in METHODS:
        raise ValueError(f"There is no clean-up {method!r} of saliency maps: use one of {', '.join(METHODS)}.")
    binary = {"otsu": otsu, "two_means": lambda values: two_means(values)[0], "threshold": threshold}
    mask = binary[method](saliency)
    if not mask.any():
        raise ValueError(
            f"No component of the saliency map is left after {method}, its largest value being "
            f"{np.max(saliency):.3g}: stretch the map to 0..1 first, or use otsu."
        )
    if components is None:
        return mask
    return keep_confident(mask, saliency, components) if method == "otsu" else keep_largest(mask, components)


def otsu(saliency: np.ndarray) -> np.ndarray:
    """Mark what lies above Otsu's threshold (paper v4)."""
    from skimage.filters import threshold_otsu

    saliency = _checked(saliency)
    return saliency > threshold_otsu(saliency)


def two_means(saliency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mark the brighter of two clusters of grey values, found at 256 x 256, and return the two centroids, ascending.

    Scikit-learn's k-means with seed 10, and nearest-neighbour scaling both ways, always rounding down (released):
    where 256 is no multiple of a side, the mask lies up to a pixel further right or down than what it marks.
    """
    from sklearn.cluster import KMeans

    height, width = _checked(saliency).shape
    rows, columns = (np.arange(SIDE) * side // SIDE for side in (height, width))
    values = _checked(saliency[np.ix_(rows, columns)])  # thin structures may fall between the samples
    clusters = KMeans(n_clusters=2, random_state=10).fit(values.reshape(-1, 1))
    centroids = clusters.cluster_centers_.ravel()
    bright = (clusters.labels_ == centroids.argmax()).reshape(SIDE, SIDE)
    back = np.ix_(*(np.arange(side) * SIDE // side for side in (height, width)))
    return bright[back], np.sort(centroids)


def threshold(saliency: np.ndarray, level: float = 0.3) -> np.ndarray:
    """Mark what lies above a level; the default is the released one."""
    return _checked(saliency) > level


def keep_largest(mask: np.ndarray, components: int = 1) -> np.ndarray:
    """Keep the components of largest area; one as large as the last of them is kept too (released)."""
    return _best(mask, mask, ndimage.sum_labels, components)


def keep_confident(mask: np.ndarray, saliency: np.ndarray, components: int = 1) -> np.ndarray:
    """Keep the components of highest mean saliency (paper v4, whose threshold of confidence is not stated)."""
    return _best(mask, saliency, ndimage.mean, components)


def boxes(mask: np.ndarray, union: bool = True) -> np.ndarray:
    """Put one box around a mask, or one around each outer component: [n, 4] int as x0, y0, x1, y1 (released).

    x1 and y1 are one past the last pixel, but stop at W - 1 and H - 1. A component in the hole of another gets none.
    Raises ValueError for an empty mask.
    """
    mask = _occupied(mask, "box")
    height, width = mask.shape
    filled = ndimage.label(ndimage.binary_fill_holes(mask), EIGHT)[0]
    spans = ndimage.find_objects(mask.astype(int) if union else filled)
    return np.array([(x.start, y.start, min(x.stop, width - 1), min(y.stop, height - 1)) for y, x in spans])


def points(mask: np.ndarray, positive: int = 10, negative: int = 0, seed: int = 0) -> np.ndarray:
    """Draw places [n, 2] without replacement: first inside the mask, then outside; their labels are mask[y, x].

    There are fewer than asked for where there are fewer pixels. Raises ValueError for an empty mask.
    """
    mask = _occupied(mask, "point")
    generator = np.random.default_rng(seed)
    drawn = [
        generator.choice(pixels, min(number, len(pixels)), replace=False)
        for number, pixels in ((positive, np.flatnonzero(mask)), (negative, np.flatnonzero(~mask)))
    ]
    y, x = np.unravel_index(np.concatenate(drawn), mask.shape)
    return np.stack([x, y], axis=1)


def _best(mask: np.ndarray, values: np.ndarray, score: Callable, components: int) -> np.ndarray:
    if components < 1:
        raise ValueError(f"To keep {components} components leaves nothing: keep 1 or more.")
    labels, count = ndimage.label(mask, EIGHT)
    scores = score(values, labels, np.arange(1, count + 1))
    kept = scores >= np.sort(scores)[-components:].min(initial=np.inf)
    return np.r_[False, kept][labels]


def _checked(saliency: np.ndarray) -> np.ndarray:
    if saliency.ndim != 2 or not (saliency.min() >= 0 and saliency.max() <= 1):  # of NaN neither is true
        raise ValueError(
            f"The saliency map of shape {saliency.shape} is not a finite [H, W] map from 0 to 1: "
            "divide 8-bit maps by 255, and look for NaN in the model that made it."
        )
    if saliency.min() == saliency.max():
        raise ValueError(
            f"The saliency map is {saliency.min():.3g} everywhere, which marks nothing: count the case as not found."
        )
    return saliency


def _occupied(mask: np.ndarray, prompt: str) -> np.ndarray:
    mask = np.asarray(mask) > 0
    if not mask.any():
        raise ValueError(f"The coarse mask is empty, so there is no {prompt} to draw: count the case as not found.")
    return mask
