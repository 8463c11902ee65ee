"""Make the phantom datasets: images drawn by seed with known truth, in which only the text names the target.

python data_scripts/phantoms.py bus --out data/phantom_bus --n 1000 --size 128 --seed 0
python data_scripts/phantoms.py cxr --out data/phantom_cxr --ambiguous 0.8
python data_scripts/phantoms.py polyp --out data/phantom_polyp --text-share 0.8
python data_scripts/phantoms.py brain --out data/phantom_brain
python data_scripts/phantoms.py torso_ct --out data/phantom_torso_ct --n 120 --size 32
python data_scripts/phantoms.py lesions_ct --out data/phantom_lesions_ct --n 420 --size 32
python data_scripts/phantoms.py lesions_mr --out data/phantom_lesions_mr --weighting T2
python data_scripts/phantoms.py lesions_varied --out data/phantom_lesions_varied --typical 0.1
python data_scripts/phantoms.py prognosis --out data/phantom_prognosis --signal both
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from phantom.bits import same_bits
from phantom.brain import write_brain
from phantom.bus import write_bus
from phantom.cxr import FRAMING, write_cxr
from phantom.lesions import SCANS, write_lesions
from phantom.polyp import write_polyp
from phantom.prognosis import SIGNALS, write_prognosis
from phantom.torso import MODALITIES, write_torso


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _shared(kind: str, number: int, size: int) -> argparse.ArgumentParser:
    """The options of every kind, with the defaults of this one."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--n", type=int, default=number, help="number of images (default: %(default)s)")
    shared.add_argument("--size", type=int, default=size, help="edge of the image in pixels (default: %(default)s)")
    shared.add_argument("--out", type=Path, default=Path(f"data/phantom_{kind}"), help="default: %(default)s")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--splits", type=_shares, default=(0.6, 0.15, 0.25), help="train,val,test")
    shared.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    return shared


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 with one sentence for bad parameters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, write, ambiguous, what in (
        ("bus", write_bus, 0.7, "breast ultrasound: one or two lesions under speckle"),
        ("cxr", write_cxr, 0.8, "chest X-ray: opacities in the zones of two lungs"),
        ("polyp", write_polyp, 0.5, "colonoscopy: polyps on folded mucosa"),
        ("brain", write_brain, 0.0, "brain MRI: a tumour of one of three kinds among other things that enhance"),
    ):
        images = 2000 if kind == "brain" else 1000  # towers need more pairs than segmenters need masks
        options = kinds.add_parser(kind, parents=[_shared(kind, images, 128)], help=what)
        options.set_defaults(write=write)
        options.add_argument("--text-share", type=float, default=0.8, help="share of cases with each prompt")
        options.add_argument(
            "--ambiguous",
            type=float,
            default=ambiguous,
            help="share of the images with text in which only the text names the target (default: %(default)s)",
        )
        if kind == "cxr":
            options.add_argument(
                "--framing",
                type=float,
                default=FRAMING,
                help="how much the chest differs in size and place between images (default: %(default)s)",
            )
    for modality in MODALITIES:
        kind = f"torso_{modality.lower()}"
        what = f"abdominal {modality} in 3-D: organs and a tumour of the same patients in CT, MR and PET"
        options = kinds.add_parser(kind, parents=[_shared(kind, 120, 32)], help=what)
        options.set_defaults(write=partial(write_torso, modality=modality))
        options.add_argument("--tumor-share", type=float, default=0.6, help="share of patients (default: %(default)s)")
    for kind, modality, typical in (
        ("lesions_ct", "CT", 0.8),
        ("lesions_mr", "MR", 0.8),
        ("lesions_varied", "CT", 0.1),
    ):
        what = f"abdominal {modality} in 3-D: lesions of eight seen and four unseen diseases, told by their attributes"
        what += ", most of them untypical" if typical < 0.5 else ""
        options = kinds.add_parser(kind, parents=[_shared(kind, 420, 32)], help=what)
        options.set_defaults(write=partial(write_lesions, kind=kind, modality=modality), splits=(0.65, 0.1, 0.25))
        options.add_argument(
            "--typical",
            type=float,
            default=typical,
            help="share of the lesions with no value that is unusual in their disease (default: %(default)s)",
        )
        if modality == "MR":
            options.add_argument(
                "--weighting", choices=SCANS[1:], default="T1", help="fluid is dark in T1, bright in T2 (default: T1)"
            )
    what = "abdominal CT in 3-D, records and survival times: image and record each say a part of the hazard"
    options = kinds.add_parser("prognosis", parents=[_shared("prognosis", 480, 32)], help=what)
    options.set_defaults(write=write_prognosis)
    options.add_argument(
        "--signal", choices=SIGNALS, default="both", help="what the hazard depends on (default: %(default)s)"
    )
    options.add_argument(
        "--censored", type=float, default=0.4, help="share of patients who outlive the study (default: %(default)s)"
    )
    options = vars(parser.parse_args(arguments))
    kind, write = options.pop("kind"), options.pop("write")
    started = time.perf_counter()
    try:
        write(**options)
    except (ValueError, OSError) as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 2
    print(f"{kind}: {options['n']} images in {options['out']} ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    same_bits()
    sys.exit(main())
