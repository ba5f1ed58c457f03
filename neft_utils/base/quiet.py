"""What a notebook switches off for its reader: bars that fill a page, warnings she cannot use."""

import logging
import warnings


def quiet_libraries():
    """No progress bars, and no warnings of transformers, TRL, PEFT and bitsandbytes.

    They speak of defaults and versions, which the profile and the pins decide. For notebooks; no
    module of this package calls it.
    """
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
