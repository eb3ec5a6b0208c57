"""`python -m layup_hf`: looks at the place where a run is to be."""

from .doctor.main import run
from .trainer.seams import WORKING, check_seams

if __name__ == "__main__":
    run(check_seams, WORKING)
