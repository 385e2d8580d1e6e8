"""Options of a build, and parsers of their command-line spellings."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from stepcell.errors import PluginError, UsageError
from stepcell.plugins.prepare import plugin_unavailable
from stepcell.runtime.engine.tensorrt_module import TensorRT
from stepcell.shapes import format_shapes

__all__ = ["BuildOptions", "check_options", "parse_memory_pool", "parse_targets"]


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a build; recorded in the sidecar.

    Attributes:
        flavor: "auto", "tensorrt" or "tensorrt-rtx".
        plugin: "auto" uses the fused plugin if it is available and faster, "on" requires it, "off" never uses it;
            "portable" requires the form that programs without stepcell can load.
        kernels: folder with the plugin's compiled kernels; None: the user's cache. Missing kernels are compiled
            and added, which needs Triton.
        min_shapes: smallest shapes by data input; those of states are derived.
        opt_shapes: shapes to optimise for.
        max_shapes: largest shapes.
        compute_capabilities: GPUs to build for, such as ("8.6", "8.9"); empty: the flavour's default.
        timing_cache: file that keeps kernel timings between builds, or None.
        optimization_level: 0 (fast build) to 5 (fast engine); None: TensorRT's default.
        workspace_mib: limit of scratch memory in MiB; None: TensorRT's default.
        version_compatible: the engine also loads in later TensorRT versions.
        verbose: log all messages of TensorRT.
    """

    flavor: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    plugin: Literal["auto", "on", "off", "portable"] = "auto"
    kernels: str | None = None
    min_shapes: dict[str, tuple[int, ...]] = {}
    opt_shapes: dict[str, tuple[int, ...]] = {}
    max_shapes: dict[str, tuple[int, ...]] = {}
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: str | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None
    version_compatible: bool = False
    verbose: bool = False

    def arguments(self) -> list[str]:
        """The equivalent options of `stepcell build`, without defaults."""
        words: list[str] = []
        for option, value in (
            ("--flavor", self.flavor if self.flavor != "auto" else ""),
            ("--plugin", self.plugin if self.plugin != "auto" else ""),
            ("--kernels", self.kernels or ""),
            ("--minShapes", format_shapes(self.min_shapes)),
            ("--optShapes", format_shapes(self.opt_shapes)),
            ("--maxShapes", format_shapes(self.max_shapes)),
            ("--compute-capability", ",".join(self.compute_capabilities)),
            ("--timingCacheFile", self.timing_cache or ""),
            ("--builderOptimizationLevel", "" if self.optimization_level is None else str(self.optimization_level)),
            ("--memPoolSize", "" if self.workspace_mib is None else f"workspace:{self.workspace_mib}"),
        ):
            words += [option, value] if value else []
        return [*words, "--versionCompatible"] if self.version_compatible else words


def check_options(options: BuildOptions, library: TensorRT) -> None:
    """Refuse options that the flavour does not support, before any work.

    Raises:
        PluginError: the plugin was required and is not available.
        UsageError: an option does not apply to this flavour, or a value is out of range.
    """
    reason = plugin_unavailable(library.flavor, library.module)
    if not reason and options.plugin == "portable" and not hasattr(library.module, "QuickPluginCreationRequest"):
        reason = f"TensorRT {library.version} cannot hold kernels in a plan, which needs 10.9 or later"
    if options.plugin in ("on", "portable") and reason:
        other = "; it needs the Enterprise flavour" if library.is_rtx else ""
        raise PluginError(
            f"--plugin {options.plugin}: {reason}{other}",
            hint="omit --plugin, or use --plugin off: the engine then uses native layers only",
        )
    if options.version_compatible and library.is_rtx:
        raise UsageError(
            "--versionCompatible: TensorRT-RTX engines load only in the version that built them",
            hint="omit it, and build again after an update; the build takes seconds",
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(f"--builderOptimizationLevel: expected 0 to 5, got {options.optimization_level}")
    if options.workspace_mib is not None and options.workspace_mib < 1:
        raise UsageError(f"--memPoolSize: expected at least 1 MiB, got {options.workspace_mib}")


def parse_memory_pool(text: str) -> int:
    """Parse trtexec's `workspace:MiB`, with an optional suffix M or G; returns MiB.

    Raises:
        UsageError: the text is malformed, or names another pool.
    """
    found = re.fullmatch(r"workspace:(\d+)(M|MiB|G|GiB)?", text.strip(), re.ASCII)
    if not found:
        raise UsageError(f"--memPoolSize: expected workspace:MiB, got {text!r}", hint="such as workspace:1024")
    return int(found[1]) * (1024 if (found[2] or "M")[0] == "G" else 1)


def parse_targets(text: str) -> tuple[str, ...]:
    """Parse compute capabilities such as `8.6,8.9`; each is returned once, in order.

    Raises:
        UsageError: a part is not MAJOR.MINOR.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"\d{1,2}\.\d", part, re.ASCII):
            raise UsageError(f"--compute-capability: expected MAJOR.MINOR[,...], got {text!r}", hint="such as 8.6,8.9")
    return tuple(dict.fromkeys(parts))
