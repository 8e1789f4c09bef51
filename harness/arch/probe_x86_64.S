/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The accelerator probe of x86-64: a 64 KiB firmware image that ends QEMU with status 0x21.
 *
 * It enters 64-bit mode with paging and counts down from 2^27 there, at CPL 0. A processor needs about 0.1 s for that.
 * Hosts exist where KVM interprets a guest's kernel instruction by instruction (kvm-pvm, a guest without PVM support):
 * real mode works there, and Linux does not get through its decompressor.
 *
 * x86_64.py holds the bytes. tests/test_accelerator.py assembles this file and compares:
 *   as -o probe.o probe_x86_64.S && objcopy -O binary -j .text probe.o probe.bin
 */
	.code16
	.globl _start
_start:					/* at 0xf0000, reached from the reset vector */
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	/* three page tables at 0x1000: the first 2 MiB mapped onto themselves */
	movw	$0x1000, %di
	movw	$0x1800, %cx
	cld
	rep stosw
	movl	$0x2003, 0x1000
	movl	$0x3003, 0x2000
	movl	$0x0083, 0x3000		/* present, writable, a page of 2 MiB */
	lgdtl	%cs:gdt_pointer - _start
	movl	$0x20, %eax		/* CR4.PAE */
	movl	%eax, %cr4
	movl	$0x1000, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER.LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	$0x80000001, %eax	/* CR0.PG, CR0.PE */
	movl	%eax, %cr0
	ljmpl	$8, $0xf0000 + long_mode - _start
	.code64
long_mode:
	movl	$0x8000000, %ecx
1:	decl	%ecx
	jnz	1b
	movb	$0x10, %al		/* isa-debug-exit: status (value << 1) | 1 */
	outb	%al, $0xf4
	hlt
	.balign	8
gdt:	.quad	0, 0x00209b0000000000	/* a 64-bit code segment */
gdt_pointer:
	.word	gdt_pointer - gdt - 1
	.long	0xf0000 + gdt - _start
