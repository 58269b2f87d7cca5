"""Wrong kernels that are in no list of the package, by which its diagnosis is judged.

Who wrote them had not read `mxfp4ref/defects`: they are what others get wrong. Keep it so. A kernel that the
diagnosis cannot tell is a reason to change the diagnosis, never the kernel, and none of these becomes a named defect
because it is here.

`tools/tables/held_out.py` runs them over the goldens and as single captured calls and prints what was said of each.
"""
