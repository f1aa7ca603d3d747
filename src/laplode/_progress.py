"""Progress bars, in notebooks as elsewhere."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm warns where a notebook has no widgets, and then draws its bars as text
    from tqdm.auto import tqdm as tqdm
