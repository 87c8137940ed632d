# What a KVM that works must be able to run, as a ROM without any firmware.
#
# A device that opens proves nothing, and neither does a guest in real mode: there are hosts whose KVM runs the
# first instructions of a guest and then fails, or crawls, at what every kernel does. So this goes where a kernel
# goes: 64-bit long mode with paging, SSE, VEX-coded instructions if CPUID has them (AVX, BMI2), millions of
# instructions with timer interrupts between them, ring 3 and back by SYSCALL. Then it leaves through QEMU's
# isa-debug-exit (QEMU's status is 2 * value + 1). Every step checks its own result.
#
# Build (tests/unit/test_kvm_probe.py does the same and compares with kvm_probe.bin):
#   as --64 -o kvm_probe.o kvm_probe.S
#   ld -m elf_x86_64 -Ttext=0xf0000 --entry=_start -o kvm_probe.elf kvm_probe.o
#   objcopy -O binary -j .text kvm_probe.elf kvm_probe.bin
#
# kvm.py puts the code at the beginning of a 64 KiB ROM (seen at 0xf0000 and below 4 GiB), with a jump to it at
# the reset vector. The descriptor table stays in the ROM, so its "accessed" bits are set beforehand: a
# processor that wanted to set them would write to the ROM.

    .set EXIT_PORT, 0xf4
    .set PASSED, 0x2a                   # status 85
    .set WRONG_RESULT, 0x2b             # status 87
    .set FAULT, 0x2c                    # status 89: an exception that should not happen
    .set NO_LONG_MODE, 0x2d             # status 91

    .set PML4, 0x1000                   # RAM: page tables, interrupt table, counter, stack
    .set PDPT, 0x2000
    .set PAGE_DIRECTORY, 0x3000
    .set IDT, 0x5000
    .set TICKS, 0x6000
    .set STACK, 0x8000
    .set LAPIC, 0xfee00000

    .set CODE64, 0x08                   # the order of the selectors is what SYSCALL and SYSRET demand
    .set DATA, 0x10
    .set CODE32, 0x18

    .set GATES, 48
    .set TIMER_GATE, 0x20
    .set WANTED_TICKS, 3
    .set ROUNDS, 20000000
    .set ROUNDS_RESULT, 0x68dacb01      # x = x * 1103515245 + 12345, ROUNDS times from 1, modulo 2^32
    .set USER_ROUNDS, 1000000

    .text
    .code16
    .globl _start
_start:
    cli
    cld
    lgdtl %cs:(gdt_pointer - _start)
    movl %cr0, %eax
    orl $1, %eax                        # PE
    movl %eax, %cr0
    ljmpl $CODE32, $protected

    .code32
protected:
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $STACK, %esp

    movl $0x80000001, %eax
    cpuid
    movl $NO_LONG_MODE, %eax
    btl $29, %edx
    jnc leave32

    movl $0x1ff, LAPIC + 0xf0           # local APIC on, the timer's controller let through (ExtINT)
    movl $0x700, LAPIC + 0x350

    movl $PML4, %edi                    # page tables: the first 16 MiB as they are, for ring 3 too
    xorl %eax, %eax
    movl $(0x3000 / 4), %ecx
    rep stosl
    movl $(PDPT | 7), PML4
    movl $(PAGE_DIRECTORY | 7), PDPT
    movl $PAGE_DIRECTORY, %edi
    movl $0x87, %eax                    # present, writable, user, 2 MiB
    movl $8, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b

    movl %cr4, %eax
    orl $0x620, %eax                    # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER: SCE, LME
    rdmsr
    orl $0x101, %eax
    wrmsr
    movl %cr0, %eax
    andl $0x9ffffff3, %eax              # not CD, NW, TS, EM
    orl $0x80010022, %eax               # PG, WP, NE, MP
    movl %eax, %cr0
    ljmpl $CODE64, $long_mode

leave32:
    outb %al, $EXIT_PORT
1:  hlt
    jmp 1b

    .code64
long_mode:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $STACK, %esp

    movl $IDT, %edi                     # every gate leads to `fault`, one to `timer`
    movl $GATES, %ecx
    movl $fault, %eax
1:  call set_gate
    decl %ecx
    jnz 1b
    movl $(IDT + 16 * TIMER_GATE), %edi
    movl $timer, %eax
    call set_gate
    lidt idt_pointer
    movl $0, TICKS

    movl $0x01020304, %eax              # SSE
    movd %eax, %xmm0
    pshufd $0, %xmm0, %xmm0
    paddd %xmm0, %xmm0
    movdqa %xmm0, STACK
    cmpl $0x02040608, STACK + 12
    jne wrong

    xorl %r12d, %r12d                   # bit 0: BMI2
    movl $1, %eax
    cpuid
    movl %ecx, %r13d
    btl $26, %r13d                      # XSAVE
    jnc no_avx
    movq %cr4, %rax
    btsq $18, %rax                      # OSXSAVE
    movq %rax, %cr4
    xorl %ecx, %ecx
    xgetbv
    orl $3, %eax                        # x87, SSE
    btl $28, %r13d                      # AVX
    jnc 1f
    orl $4, %eax
1:  xsetbv
    btl $28, %r13d
    jnc no_avx
    vpaddd %xmm0, %xmm0, %xmm1
    vmovd %xmm1, %eax
    cmpl $0x04080c10, %eax
    jne wrong
no_avx:
    xorl %eax, %eax
    cpuid
    cmpl $7, %eax
    jb no_bmi2
    movl $7, %eax
    xorl %ecx, %ecx
    cpuid
    btl $8, %ebx                        # BMI2
    jnc no_bmi2
    incl %r12d
    movl $9, %ecx
    movl $3, %eax
    shlx %rcx, %rax, %rdx
    cmpl $(3 << 9), %edx
    jne wrong
no_bmi2:

    movb $0x11, %al                     # interrupt controllers: vectors 0x20 and 0x28, the timer's line only
    outb %al, $0x20
    outb %al, $0xa0
    movb $TIMER_GATE, %al
    outb %al, $0x21
    movb $(TIMER_GATE + 8), %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xfe, %al
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    movb $0x34, %al                     # timer: 1193182 Hz / 1193: every millisecond
    outb %al, $0x43
    movb $(1193 & 0xff), %al
    outb %al, $0x40
    movb $(1193 >> 8), %al
    outb %al, $0x40

    sti
    movl $ROUNDS, %ecx                  # so many that no instruction emulator does them in time
    movl $1, %eax
1:  imull $1103515245, %eax, %eax
    addl $12345, %eax
    decl %ecx
    jnz 1b
    cmpl $ROUNDS_RESULT, %eax
    jne wrong
1:  cmpl $WANTED_TICKS, TICKS
    jae 2f
    hlt
    jmp 1b
2:  cli

    movl $0xc0000081, %ecx              # STAR: SYSCALL's CODE64, SYSRET's base
    xorl %eax, %eax
    movl $((CODE32 << 16) | CODE64), %edx
    wrmsr
    incl %ecx                           # LSTAR: where SYSCALL leads
    movl $from_user, %eax
    xorl %edx, %edx
    wrmsr
    addl $2, %ecx                       # FMASK
    wrmsr
    movl $user, %ecx
    movl $2, %r11d                      # flags: no interrupts, there is no task segment for them
    sysretq

user:
    movl $USER_ROUNDS, %ecx
    xorl %eax, %eax
    movl $1, %edx
    movl $2, %esi
1:  testl %r12d, %r12d
    jz 2f
    shlx %esi, %edx, %ebx               # 4
    addl %ebx, %eax
    jmp 3f
2:  addl $4, %eax
3:  decl %ecx
    jnz 1b
    movw %cs, %di
    syscall

from_user:
    cmpl $(4 * USER_ROUNDS), %eax
    jne wrong
    andl $3, %edi                       # it ran in ring 3
    cmpl $3, %edi
    jne wrong
    movb $PASSED, %al
    jmp leave
wrong:
    movb $WRONG_RESULT, %al
    jmp leave
fault:
    movb $FAULT, %al
leave:
    outb %al, $EXIT_PORT
1:  hlt
    jmp 1b

timer:
    pushq %rax
    incl TICKS
    movb $0x20, %al                     # end of interrupt
    outb %al, $0x20
    popq %rax
    iretq

set_gate:                               # %edi: the gate (moves on), %eax: the handler, below 4 GiB
    movw %ax, (%rdi)
    movw $CODE64, 2(%rdi)
    movw $0x8e00, 4(%rdi)               # present, interrupt gate
    movl %eax, %edx
    shrl $16, %edx
    movw %dx, 6(%rdi)
    movq $0, 8(%rdi)
    addl $16, %edi
    ret

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # CODE64
    .quad 0x00cf93000000ffff            # DATA
    .quad 0x00cf9b000000ffff            # CODE32
    .quad 0x00cff3000000ffff            # ring 3 data: SYSRET's base + 8
    .quad 0x00affb000000ffff            # ring 3 code: SYSRET's base + 16
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
idt_pointer:
    .word GATES * 16 - 1
    .quad IDT
