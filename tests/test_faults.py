"""Two of the faults on one script. All of them on all: pytest tests/faults.py."""

from faults import CASES, test_checkpoint as checkpoint, test_folder as folder


def test_cheap_faults_on_one_script():
    checkpoint(CASES["pixel_vit"])
    folder(CASES["pixel_vit"])
