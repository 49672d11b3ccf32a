"""The compiler's mark, and that nothing imports the compiler before it is wanted."""

import subprocess
import sys

import torch

from isoscale.formats.tracing import compile_time_constant


def test_the_mark_is_torch_s_own():
    def ours():
        return 1

    def theirs():
        return 1

    compile_time_constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_importing_formats_does_not_import_the_compiler():
    code = "import isoscale.formats, sys; assert 'torch._dynamo' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    wrong = code.replace("import isoscale.formats,", "import torch._dynamo,")
    assert subprocess.run([sys.executable, "-c", wrong], capture_output=True, check=False).returncode != 0  # the control
