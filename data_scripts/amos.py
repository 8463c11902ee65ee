"""Make a dataset folder of AMOS (abdominal CT or MR, 15 or 13 organs) from the archive.

python data_scripts/amos.py --modality ct --archive ~/Downloads/amos22.zip --out data/amos_ct
python data_scripts/amos.py --modality mr --archive ~/Downloads/amos22.zip --out data/amos_mr
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from common import run, unpacked
from volumes import HERMES, Layout, Structure, choose, find_scans, structures, write

from lib.files import DataError

ORGANS = structures(
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    Structure("prostate or uterus", released="prostate/uterus"),
)
FIRST_MR = 500  # smaller numbers are CT, says the release
CT = Layout(
    name="amos_ct",
    title="AMOS, abdominal CT with 15 organs",
    modality="CT",
    region="abdomen",
    structures=ORGANS,
    image="images{part}/amos_{case}.nii",
    mask="labels{part}/amos_{case}.nii",
    prefix="amos_",
    parts={"Tr": "train", "Va": "test"},
    held_out={"val": ("0212", "0296", "0366", "0350", "0098")},
    splits=f"Test: the validation scans of the release. Validation: from its training scans, as in {HERMES}.",
    licence="Recalled as CC BY 4.0 (Zenodo), not verified; its paper's page begins CC BY-NC.",
    citation="Ji Y, Bai H, Ge C, et al. AMOS: a large-scale abdominal multi-organ benchmark. NeurIPS 2022.",
    where="from https://zenodo.org/records/7262581",
    notes=("Patients are not named: each scan counts as one.", "Postcava is another word for the inferior vena cava."),
)
MR = replace(
    CT,
    name="amos_mr",
    title="AMOS, abdominal MR with 13 organs",
    modality="MR",
    structures=ORGANS[:13],
    ignored={14: "bladder", 15: "prostate or uterus"},
    held_out={"val": ("0518", "0593")},
)
LAYOUTS = {"ct": CT, "mr": MR}


def build(layout: Layout, args: argparse.Namespace) -> None:
    """Write the folder from the scans of one modality."""
    with unpacked(args) as (folder, origin):
        scans, unlabelled = find_scans(folder, layout)
        chosen = [s for s in scans if (int(s.case_id.removeprefix("amos_")) < FIRST_MR) == (layout.modality == "CT")]
        if not chosen:
            raise DataError(f"{folder} holds no {layout.modality} scan with masks: give the whole archive.")
        left_out = f"{unlabelled} volumes of both modalities have no masks and were left out."
        write(args, layout, chosen, [left_out, origin])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    chosen, rest = choose("--modality", LAYOUTS, argv)
    layout = LAYOUTS[chosen]
    run(layout.name, partial(build, layout), __doc__, layout.where, argv=rest)


if __name__ == "__main__":
    main()
