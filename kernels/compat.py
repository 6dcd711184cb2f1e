"""Functions of newer C and C++ libraries, linked into each module, so that it loads with older ones.

The linker takes only what a module needs. All of it is hidden: only the module uses it.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from core import files, tools

if TYPE_CHECKING:
    from pathlib import Path

_SOURCES = {
    # Headers of libstdc++ read this variable of glibc 2.32 to skip atomic operations in a process with one thread. The
    # module's own one says that there may be more threads, which is always correct.
    "threads": 'extern "C" { __attribute__((visibility("hidden"))) char __libc_single_threaded; }\n',
    # std::allocator calls it; libstdc++ has it since GCC 12 (GLIBCXX_3.4.29).
    "arrays": """\
#include <new>
namespace std {
__attribute__((visibility("hidden"), noreturn)) void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}
""",
    # Headers of glibc 2.38 call __isoc23_strtol for strtol, and so on: those also read C23's binary numbers, "0b1". The
    # module's own ones do as before. They include no header, which would rename the functions again.
    "numbers": """\
#define NUMBER(TYPE, NAME, CHAR) \\
    extern "C" TYPE NAME(const CHAR*, CHAR**, int); \\
    extern "C" __attribute__((visibility("hidden"))) TYPE __isoc23_##NAME(const CHAR* text, CHAR** end, int base) \\
    { return NAME(text, end, base); }
NUMBER(long, strtol, char)
NUMBER(long long, strtoll, char)
NUMBER(long, strtoimax, char)
NUMBER(unsigned long, strtoul, char)
NUMBER(unsigned long long, strtoull, char)
NUMBER(unsigned long, strtoumax, char)
NUMBER(long, wcstol, wchar_t)
NUMBER(long long, wcstoll, wchar_t)
NUMBER(unsigned long, wcstoul, wchar_t)
NUMBER(unsigned long long, wcstoull, wchar_t)
""",
    "scans": """\
#define SCAN(NAME, FROM) \\
    extern "C" int __isoc99_##NAME(FROM, const char*, __builtin_va_list); \\
    extern "C" __attribute__((visibility("hidden"))) \\
    int __isoc23_##NAME(FROM from, const char* format, __builtin_va_list list) \\
    { return __isoc99_##NAME(from, format, list); }
#define SCAN_LIST(NAME, FROM) \\
    SCAN(v##NAME, FROM) \\
    extern "C" __attribute__((visibility("hidden"))) int __isoc23_##NAME(FROM from, const char* format, ...) { \\
        __builtin_va_list list; \\
        __builtin_va_start(list, format); \\
        int count = __isoc99_v##NAME(from, format, list); \\
        __builtin_va_end(list); \\
        return count; \\
    }
SCAN_LIST(sscanf, const char*)
SCAN_LIST(fscanf, void*)
""",
}

NAME = f"compat-{hashlib.sha256(json.dumps(_SOURCES).encode()).hexdigest()[:12]}.a"
"""The archive's file. Other sources have another name: a cache may hold the archive of an older version of Hearth."""


def build(cxx: str, place: Path) -> None:
    """Compile the archive that each module is linked with."""
    archiver = tools.build(cxx, "-print-prog-name=ar").stdout.strip()
    with files.draft(place) as part:
        objects = {part.with_name(f"{name}.o"): text for name, text in _SOURCES.items()}
        for each, text in objects.items():
            tools.build(cxx, "-c", "-O1", "-fPIC", "-x", "c++", "-o", each, "-", input_text=text)
        tools.build(archiver, "rcs", part, *objects)
        part.replace(place)
