"""The prompt explorer's Python half: answers requests of its ES module with a probability map."""

import base64
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anywidget
import numpy as np
import torch
import traitlets
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lib import models
from lib.data import Case, Dataset, ImageCache, load_dataset
from lib.files import DataError
from lib.text import CaptionBank

ALL = 60  # answers to a case's prompts that are worth computing beforehand, and storing in a page


class PromptExplorer(anywidget.AnyWidget):
    """A model, a few cases, and one text field per prompt role.

    The browser asks through `request` {id, case, prompts: role -> string or null} and is answered through
    `answer` {id, probability (PNG data URL), milliseconds, error}. Threshold, overlays and Dice are computed in
    the browser. `table` holds answers computed beforehand, so that a page without a kernel can still show them.
    Of a volume three slices are shown side by side, through the middle of the case's structure. A model whose
    `encode_image` reads prompts too names their roles in `image_roles`.
    """

    _esm = Path(__file__).with_name("explorer.js")
    cases = traitlets.List(traitlets.Dict()).tag(sync=True)
    roles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    suggestions = traitlets.Dict().tag(sync=True)
    table = traitlets.Dict().tag(sync=True)
    request = traitlets.Dict().tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    threshold = traitlets.Float(0.5).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)

    def __init__(self, model: nn.Module, cache: ImageCache, bank: CaptionBank, title: str = "", tokens: bool = False):
        super().__init__(title=title)
        self._model, self._cache, self._bank, self._tokens = model.eval(), cache, bank, tokens
        self._features: dict[tuple, object] = {}
        self._image_of = {row: image for image, rows in enumerate(cache.rows.tolist()) for row in rows}
        self.roles = list(model.roles)
        self.cases = [self._describe(i) for i in range(len(cache.cases))]
        self.suggestions = {role: self._suggest(role) for role in self.roles}
        self.observe(self._respond, names="request")

    def _describe(self, index: int) -> dict:
        case = self._cache.cases[index]
        image = self._cache.images[self._image_of[index]]
        shown = self._slices(index, image[0]) if image.ndim == 4 else image.permute(1, 2, 0).squeeze(-1)
        return {
            "name": case.case_id,
            "image": png(shown.cpu().numpy()),
            "truth": png(self._slices(index, self._cache.masks[index, 0]).cpu().numpy()),
            "prompts": {role: case.prompts.get(role) for role in self.roles},
        }

    def _slices(self, index: int, array: Tensor) -> Tensor:
        """A plane as it is; of [D, H, W] the axial, coronal and sagittal slice through the structure, as films hang."""
        if array.ndim == 2:
            return array
        inside = self._cache.masks[index, 0].nonzero()
        z, y, x = (inside.float().mean(0).round().long() if len(inside) else torch.tensor(array.shape) // 2).tolist()
        planes = [plane.flip(0, 1) for plane in (array[z], array[:, y], array[:, :, x])]
        tall = max(plane.shape[0] for plane in planes)
        return torch.cat([F.pad(plane, (0, 0, 0, tall - plane.shape[0])) for plane in planes], 1)

    def _suggest(self, role: str) -> list[str]:
        own = (case["prompts"][role] for case in self.cases)
        return list(dict.fromkeys(text for text in own if text))

    @torch.no_grad()
    def probability(self, case: int, prompts: dict[str, str | None]) -> np.ndarray:
        """Segment one case under these prompts: [H, W] probabilities of what is shown; an image is encoded once."""
        if case not in range(len(self._cache.cases)):
            raise ValueError(f"Case {case} is not shown here: choose 0 to {len(self._cache.cases) - 1}.")
        unknown = sorted(set(prompts) - set(self.roles))
        if unknown:
            raise ValueError(f"Unknown prompt role {unknown[0]!r}: this model reads {', '.join(self.roles)}.")
        texts = {role: [prompts.get(role)] for role in self.roles}
        self._bank.embed((text for (text,) in texts.values() if text is not None), self._tokens)
        asked = self._bank.prompts(texts, self._tokens).to(self._cache.images.device)
        features = self._image_key(case, prompts)
        if features not in self._features:
            image = self._cache.images[features[0] : features[0] + 1]
            self._features[features] = self._model.encode_image(image, *([asked] if features[1:] else []))
        prediction = self._model.decode(self._features[features], asked)
        return self._slices(case, prediction.logits[0, 0].sigmoid().float()).cpu().numpy()

    def _image_key(self, case: int, prompts: dict[str, str | None]) -> tuple:
        """The number of a case's image, and the prompts that the model reads when it encodes it."""
        return self._image_of.get(case), *(prompts.get(role) for role in getattr(self._model, "image_roles", ()))

    def ask(self, case: int, prompts: dict[str, str | None]) -> dict:
        """Answer one request; an error of the model becomes one sentence in the answer."""
        try:
            if self._image_key(case, prompts) not in self._features:
                self.probability(case, prompts)  # so that the time below is the prompt's and not the image's
            start = time.perf_counter()
            probability = self.probability(case, prompts)
            milliseconds = (time.perf_counter() - start) * 1000
        except Exception as error:  # whatever the model raises, the reader sees a sentence, not a dead widget
            return {"error": " ".join(str(error).split()) or type(error).__name__}
        return {"probability": png(probability), "milliseconds": round(milliseconds, 1), "error": ""}

    def precompute(self, alternatives: int = 2) -> None:
        """Fill `table` with the answers to every case's own, absent and `alternatives` suggested prompts.

        Where all combinations would be more than ALL, only the own prompts, none, and those that differ from the own
        ones in a single role are answered.
        """
        table = {}
        self._bank.embed((text for texts in self.suggestions.values() for text in texts), self._tokens)
        for index, case in enumerate(self.cases):
            choices = [
                list(dict.fromkeys([case["prompts"][role], None, *self.suggestions[role][:alternatives]]))
                for role in self.roles
            ]
            own = tuple(case["prompts"][role] for role in self.roles)
            asked = itertools.product(*choices)
            if math.prod(map(len, choices)) > ALL:
                single = ((*own[:n], text, *own[n + 1 :]) for n, texts in enumerate(choices) for text in texts)
                asked = dict.fromkeys([own, (None,) * len(own), *single])
            for texts in asked:
                table[key(index, texts)] = self.ask(index, dict(zip(self.roles, texts, strict=True)))
        self.table = table

    def _respond(self, change: dict) -> None:
        request = change["new"]
        if request:
            self.answer = {"id": request["id"]} | self.ask(request["case"], request["prompts"])


def key(case: int, texts: Sequence[str | None]) -> str:
    """Name one answer as the ES module does: JSON of [case, text per role] without spaces."""
    return json.dumps([case, *texts], separators=(",", ":"), ensure_ascii=False)


def png(array: np.ndarray) -> str:
    """Encode a [H, W] or [H, W, 3] array of values in [0, 1] as a PNG data URL."""
    levels = (np.clip(array.astype(np.float32), 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def explore(
    model: nn.Module | str | Path,
    dataset: Dataset | str | Path,
    *,
    encoder: str | None = None,
    size: int | None = None,
    channels: int = 1,
    tokens: bool = False,
    n: int = 6,
    split: str = "test",
    precompute: bool = False,
    captions: Path = Path("runs/captions"),
) -> PromptExplorer:
    """Open the explorer on a model (or a weights file of this book) and the first `n` outlined cases with text.

    `encoder`, `size`, `channels` and `tokens` are read from the weights file; a bare model needs the first two.
    Raises ValueError with a remedy.
    """
    title, spacing = "", None
    if isinstance(model, str | Path):
        path = Path(model)
        model, meta = models.load(path)
        notes = meta["notes"]
        encoder, size = encoder or notes["encoder"], size or notes["size"]
        channels, tokens = notes.get("channels", channels), notes.get("tokens", tokens)
        title, spacing = path.stem, notes.get("spacing")
    if encoder is None or size is None:
        raise ValueError("A bare model needs encoder= and size=: give those it was trained with.")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    chosen = _choose(dataset.split(split), model.roles, n, lambda case: _outlined(case, channels))
    cache = ImageCache.load(chosen, size, channels, drop_empty=True, spacing=spacing)
    explorer = PromptExplorer(model, cache, CaptionBank(encoder, captions), title, tokens)
    if precompute:
        explorer.precompute()
    return explorer


def _choose(cases: Sequence[Case], roles: Sequence[str], n: int, fitting: Callable[[Case], bool]) -> list[Case]:
    """Take `n` fitting cases, first those that have text, so that there is something to change; keep their order."""

    def wordless(case: Case) -> bool:
        return not any(case.prompts.get(role) for role in roles)

    return list(itertools.islice(filter(fitting, sorted(cases, key=wordless)), n))


def _outlined(case: Case, channels: int) -> bool:
    """Whether there is anything to outline; a structure that a volume lacks may have text all the same."""
    try:
        ImageCache.load([case], 8, channels, drop_empty=True)
    except DataError as error:
        if "no case to load" not in str(error):
            raise
        return False
    return True
