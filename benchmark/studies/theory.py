"""The planning bound (Theorems 2 and 3), counted from what `make theory` keeps of `safe_policy_improvement.py`."""

from collections import defaultdict

from benchmark.common import RESULTS, markdown, read_table

FILE = RESULTS / "theory" / "planning_bound.csv"
SIDES = "inside", "outside"


def table() -> str:
    """Markdown: of each planner's policies in N^C and outside, how many improve by less than the theorem promises.

    The promise is the improvement seen in the model, minus ζ.
    """
    values = defaultdict(list)
    for row in read_table(FILE):
        values[row["case"], row["quantity"]].append(float(row["value"]))
    rows = []
    for case in (case for case, quantity in values if quantity == "zeta" and case.split(",")[0] in SIDES):
        columns = (values[case, name] for name in ("real improvement", "model improvement", "zeta"))
        broken = [real < imagined - zeta for real, imagined, zeta in zip(*columns, strict=True)]
        rows.append([*case.split(", "), str(len(broken)), str(sum(broken))])
    for side in SIDES:
        own = [row for row in rows if row[0] == side]
        rows.append([side, "all", *(str(sum(int(row[i]) for row in own)) for i in (2, 3))])
    return markdown(["the neighbourhood", "planner", "policies", "break the promise"], rows)
