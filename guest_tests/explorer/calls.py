# SPDX-License-Identifier: GPL-2.0
"""Rows of system calls by machine code.

Under emulation ctypes takes 8 µs for each argument that it converts, and the kernel 2 µs for a system call that does
little (measured with Debian's 6.12 under TCG). So the calls of a whole program are written into a block of memory, and
one call without arguments makes all of them.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from collections.abc import Sequence
from typing import Final

from guest_tests.mm import syscalls

#: words of a record: number, six arguments, result
WORDS: Final = 8
#: the number of a record that stores the byte in its second argument at the address in its first
STORE: Final = -1
#: how many records fit into the block
MOST: Final = 2000

# A function without arguments. It goes through the records of the block whose address is behind the code, makes each
# call, writes down its result, and stops behind the last record or at one that fails. It returns the number of records
# before that. The first record's first word is how many there are behind it.
_CODES: Final = {
    "x86_64": bytes.fromhex(
        "53 4154 4155 488b1d54000000"  # push rbx; push r12; push r13; mov rbx, [rip+block]
        "4c8b23 4883c340 4531ed"  # mov r12, [rbx]; add rbx, 64; xor r13d, r13d
        "4d39e5 743c"  # 1: cmp r13, r12; je 4f
        "488b03 488b7b08 488b7310"  # mov rax, [rbx]; mov rdi, [rbx+8]; mov rsi, [rbx+16]
        "488b5318 4c8b5320"  # mov rdx, [rbx+24]; mov r10, [rbx+32]
        "4c8b4328 4c8b4b30"  # mov r8, [rbx+40]; mov r9, [rbx+48]
        "4885c0 7810"  # test rax, rax; js 2f
        "0f05 48894338"  # syscall; mov [rbx+56], rax
        "483d01f0ffff 730e eb03"  # cmp rax, -4095; jae 4f; jmp 3f
        "408837"  # 2: mov [rdi], sil
        "4883c340 49ffc5 ebbf"  # 3: add rbx, 64; inc r13; jmp 1b
        "4c89e8 415d 415c 5b c3"  # 4: mov rax, r13; pop r13; pop r12; pop rbx; ret
    ),
    "aarch64": bytes.fromhex(
        "c9020058 2a0140f9 29010191 0b0080d2"  # ldr x9, block; ldr x10, [x9]; add x9, x9, #64; mov x11, #0
        "7f010aeb e0010054"  # 1: cmp x11, x10; b.eq 4f
        "280140f9 208540a9"  # ldr x8, [x9]; ldp x0, x1, [x9, #8]
        "228d41a9 249542a9"  # ldp x2, x3, [x9, #24]; ldp x4, x5, [x9, #40]
        "c800f8b7 010000d4 201d00f9"  # tbnz x8, #63, 2f; svc #0; str x0, [x9, #56]
        "1ffc3fb1 c2000054 02000014"  # cmn x0, #4095; b.hs 4f; b 3f
        "01000039"  # 2: strb w1, [x0]
        "29010191 6b050091 f1ffff17"  # 3: add x9, x9, #64; add x11, x11, #1; b 1b
        "e0030baa c0035fd6"  # 4: mov x0, x11; ret
    ),
}


class Calls:
    """Makes rows of system calls."""

    def __init__(self) -> None:
        length = -(-(MOST + 1) * WORDS * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        self._block = syscalls.mmap(0, length, syscalls.PROT_RW, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
        self._words = memoryview((ctypes.c_char * length).from_address(self._block)).cast("B")
        code = _CODES.get(platform.machine())
        self._run = self._by_ctypes if code is None else _function(code, self._block)
        self._results = self._words.cast("q")

    def run(self, records: list[int]) -> int:
        """Make the calls of records until one fails.

        :param records: :data:`WORDS` words for each record, the result included; at most :data:`MOST` records.
        :returns: 0, or the errno with which one of them failed.
        """
        count = len(records) // WORDS
        struct.pack_into(f"={len(records) + 1}q", self._words, (WORDS - 1) * 8, 0, *records)
        self._results[0] = count
        done = self._run()
        return 0 if done == count else -self._results[(done + 2) * WORDS - 1]

    def call(self, number: int, *args: int) -> int:
        """Make one system call; returns 0, or its errno."""
        return self.run([number, *args, *_PADDING[len(args)]])

    def _by_ctypes(self) -> int:
        """What the machine code does, for machines without any."""
        for index in range(self._results[0]):
            record = self._results[(index + 1) * WORDS : (index + 2) * WORDS].tolist()
            if record[0] == STORE:
                ctypes.c_ubyte.from_address(record[1]).value = record[2]
                continue
            error = _errno(record[0], record[1:7])
            self._results[(index + 2) * WORDS - 1] = -error
            if error:
                return index
        return self._results[0]


_PADDING: Final = [[0] * (WORDS - 1 - count) for count in range(WORDS)]


def _errno(number: int, args: Sequence[int]) -> int:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.argtypes = [ctypes.c_long] * WORDS
    function.restype = ctypes.c_long
    return ctypes.get_errno() if function(number, *args, 0) == -1 else 0


def _function(code: bytes, block: int) -> ctypes._FuncPointer:
    """The code as a function, with the address of the block behind it."""
    address = syscalls.mmap(0, mmap.PAGESIZE, syscalls.PROT_RW, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
    text = code + struct.pack("=q", block)
    ctypes.memmove(address, text, len(text))
    # The kernel makes new code visible to instruction fetches when a page becomes executable.
    syscalls.mprotect(address, mmap.PAGESIZE, syscalls.PROT_READ | syscalls.PROT_EXEC)
    return ctypes.PYFUNCTYPE(ctypes.c_long)(address)
