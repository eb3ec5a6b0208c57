"""Looks at the place where a run is to be, before it is: `python -m layup_hf`.

Nothing here is needed to train. Each check is a function that returns findings; `report.py` alone prints.
"""
