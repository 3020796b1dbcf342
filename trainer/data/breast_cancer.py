"""569 tumours of the breast, measured under the microscope: a real table that needs no download.

It is 'Breast Cancer Wisconsin (Diagnostic)' (W. Wolberg, O. Mangasarian, N. Street and W. Street,
1993, UCI Machine Learning Repository, https://doi.org/10.24432/C5DW2B), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), in the order in which scikit-learn ships it; with
names for the columns and words for the two classes, and otherwise unchanged.
"""

from pathlib import Path

from trainer.data.table import Table, table


def breast_cancer() -> Table:
    """Opens the table.

    Returns:
        A source with `diagnosis` (int64: 0 benign, of which there are 357, 1 malignant, 212) and 30
        numbers, such as `mean_radius`, `radius_error` and `worst_radius`.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    return table(str(Path(__file__).with_name('breast_cancer.csv')), label='diagnosis')
