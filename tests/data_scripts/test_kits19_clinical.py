"""KiTS19's records: what is known before and after surgery stays apart, and follow-up is checked."""

import json

import kits19_clinical
import pytest

from lib.data import load_dataset

PATIENT = {
    "age_at_nephrectomy": 49,
    "gender": "male",
    "body_mass_index": 29.47,
    "comorbidities": {"copd": True, "chronic_kidney_disease": True, "leukemia": False},
    "smoking_history": "previous_smoker",
    "radiographic_size": 2.0,
    "pathologic_size": 2.1,
    "pathology_t_stage": "1a",
    "pathology_n_stage": "X",
    "pathology_m_stage": "0",
    "tumor_histologic_subtype": "clear_cell_rcc",
    "tumor_necrosis": False,
    "tumor_isup_grade": None,
    "surgical_procedure": "partial_nephrectomy",
    "vital_status": "censored",
    "vital_days_after_surgery": 700,
}


@pytest.fixture
def archive(tmp_path):
    """A function that writes kits.json with 40 patients, ten of whom died, after a change to the first."""

    def write(**change):
        patients = [
            PATIENT
            | {"case_id": f"case_{n:05d}", "vital_status": "censored" if n % 4 else "dead"}
            | ({"vital_days_after_surgery": 0} if n == 39 else {})
            for n in range(40)
        ]
        patients[0] |= change
        patients[0] = {key: value for key, value in patients[0].items() if value != "gone"}
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/kits.json").write_text(json.dumps(patients))
        return tmp_path / "data"

    return write


def run(folder, tmp_path, option="--archive"):
    kits19_clinical.main([option, str(folder), "--out", str(tmp_path / "kits19_clinical")])
    return load_dataset(tmp_path / "kits19_clinical", verify=True)


def test_records_have_outcomes_and_no_image(archive, tmp_path):
    dataset = run(archive(), tmp_path)
    assert dataset.card.dims == 0 and len(dataset.cases) == 39
    assert dataset.cases[0].outcome == (700, True) and dataset.cases[1].outcome == (700, False)
    assert dataset.cases[0].image is None and dataset.cases[0].spacing == ()
    deaths = {split: sum(case.outcome[1] for case in dataset.split(split)) for split in dataset.card.counts}
    assert deaths == {"train": 6, "val": 1, "test": 3}
    assert dataset.card.notes[0].startswith("Only 10 of 39 patients died") and "test 3" in dataset.card.notes[0]
    assert dataset.card.notes[1].startswith("1 patients without follow-up")


def test_what_pathology_found_is_not_in_the_first_sentence(archive, tmp_path):
    prompts = run(archive(), tmp_path).cases[0].prompts
    assert prompts["report"] == (
        "Patient with a kidney tumor of 2 cm on the scan, 49 years, male, body mass index 29.47, previous smoker, "
        "with COPD and chronic kidney disease."
    )
    assert prompts["report@pathology"] == (
        "Pathology after partial nephrectomy: clear cell renal cell carcinoma of 2.1 cm, without necrosis, "
        "stage T1a NX M0."
    )
    assert prompts["report@both"] == f"{prompts['report']} {prompts['report@pathology']}"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"body_mass_index": "gone"}, "lacks 'body_mass_index' for patient 'case_00000'"),
        ({"vital_days_after_surgery": -5}, "gives patient 'case_00000' the follow-up '-5': expected days, 0 or more"),
        ({"vital_status": "unknown"}, "gives patient 'case_00000' the outcome 'unknown'"),
    ],
)
def test_a_table_that_cannot_be_is_refused(archive, tmp_path, change, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(archive(**change), tmp_path)
    assert not (tmp_path / "kits19_clinical").exists()


def test_a_folder_without_the_table_or_with_another_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=r"holds no 'kits\.json'"):
        run(tmp_path / "data", tmp_path)
    for content, sentence in (("{", "cannot be read as JSON"), ("{}", "is no list of patients")):
        (tmp_path / "data/kits.json").write_text(content)
        with pytest.raises(SystemExit, match=sentence):
            run(tmp_path / "data", tmp_path)


def test_the_mirror_has_few_deaths(mirrors, tmp_path):
    if not (mirrors / "kits19_masks_clinical_malenia/kits.json").is_file():
        pytest.skip(f"There is no mirror of KiTS19's records at {mirrors}: set MIRROR_DIR to have it tested.")
    dataset = run(mirrors, tmp_path, "--mirror")
    assert len(dataset.cases) == 207 and sum(case.outcome[1] for case in dataset.cases) == 21
    for case in dataset.cases:
        told = case.prompts["report"].lower()
        assert not any(word in told for word in ("carcinoma", "isup", "stage t", "necrosis", "nephrectomy", "none"))
        assert "None" not in case.prompts["report@both"]
