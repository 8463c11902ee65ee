"""Make a dataset folder of StructSeg 2019 (CT for radiotherapy, 22 organs of the head or 6 of the chest).

python data_scripts/structseg.py --part head --archive ~/Downloads/HaN_OAR.zip --out data/structseg_head
python data_scripts/structseg.py --part thorax --archive ~/Downloads/Thoracic_OAR.zip --out data/structseg_thorax
"""

from collections.abc import Sequence
from dataclasses import replace

from volumes import HERMES, WIDE, Layout, Structure, choose, run_layout, structures

HEAD_TEST = "1 2 45 22 47 10 5 42 40 18"
THORAX_TEST = "44 6 29 15 37 13 1 28 48 8"
HEAD = Layout(
    name="structseg_head",
    title="StructSeg 2019, CT of head and neck with 22 organs at risk",
    modality="CT",
    region="head and neck",
    structures=structures(
        "left eye",
        "right eye",
        "left lens",
        "right lens",
        Structure("left optical nerve", released="leftoptical nerve"),
        "right optical nerve",
        Structure("optical chiasma", released="optical chiasma"),
        "pituitary",
        "brainstem",
        "left temporal lobes",
        "right temporal lobes",
        "spinal cord",
        "left parotid gland",
        Structure("right parotid gland", released="righparotidgland"),
        "left inner ear",
        "right inner ear",
        "left middle ear",
        Structure("right middle ear", released="rightmiddle ear"),
        Structure("left temporomandibular joint", released="lefttemporomandibular joint"),
        Structure("right temporomandibular joint", released="righttemporomandibular joint"),
        "left mandible",
        "right mandible",
    ),
    image="HaN_OAR/{case}/data.nii",
    mask="HaN_OAR/{case}/label.nii",
    prefix="patient",
    window=WIDE,
    held_out={"val": ("25",), "test": HEAD_TEST.split()},
    splits=f"Validation and test: those of {HERMES}, by patient.",
    licence="For participants of the challenge who agreed to its terms; recalled, not verified.",
    citation="StructSeg 2019: automatic structure segmentation for radiotherapy planning. MICCAI challenge.",
    where="from https://structseg2019.grand-challenge.org (account and agreement)",
    notes=("The order of the labels is that of DuPLUS's class list; the release was not seen.",),
)
THORAX = replace(
    HEAD,
    name="structseg_thorax",
    title="StructSeg 2019, CT of the chest with 6 organs at risk",
    region="thorax",
    structures=structures("right lung", "left lung", "heart", "esophagus", "trachea", "spinal cord"),
    image="Thoracic_OAR/{case}/data.nii",
    mask="Thoracic_OAR/{case}/label.nii",
    held_out={"val": ("3", "4"), "test": THORAX_TEST.split()},
)
LAYOUTS = {"head": HEAD, "thorax": THORAX}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    part, rest = choose("--part", LAYOUTS, argv)
    run_layout(LAYOUTS[part], __doc__, rest)


if __name__ == "__main__":
    main()
