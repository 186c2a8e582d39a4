# A guest kernel of a few hundred bytes that does what single letters on its console tell it to.
#   any other letter: echo it           q: power off by ACPI          r: reset by port 0xcf9
#   k: reset by the i8042               t: triple-fault               s: spin for ever
#   h: halt for ever                    f: fill 32 to 64 MiB with a pattern, then say F
#   z: say Z if 32 to 64 MiB are all zero, else D
#   m: write each of KVM's pvclock MSRs, and say W if that went well, G if it faulted; then M
# It says U when it is up, and opens its serial port as Linux does just before init.

.intel_syntax noprefix
.globl _start

.set UART_TX, 0x3f8
.set UART_IER, 0x3f9
.set UART_MCR, 0x3fc
.set UART_LSR, 0x3fd
.set START, 32 << 20
.set QWORDS, (32 << 20) / 8

.macro say character
    mov dx, UART_TX
    mov al, \character
    out dx, al
.endm

.macro outport port, value
    mov dx, \port
    mov al, \value
    out dx, al
.endm

.text
_start:
    cld
    say 'U'
    outport UART_MCR, 0x0b          # DTR, RTS, OUT2
    outport UART_IER, 0x01          # RDI
next:
    mov dx, UART_LSR
1:  pause
    in al, dx
    test al, 1
    jz 1b
    mov dx, UART_TX
    in al, dx
    cmp al, 'q'
    je power_off
    cmp al, 'r'
    je reset
    cmp al, 'k'
    je keyboard_reset
    cmp al, 't'
    je triple_fault
    cmp al, 's'
    je spin
    cmp al, 'h'
    je halt
    cmp al, 'f'
    je fill
    cmp al, 'z'
    je scan
    cmp al, 'm'
    je msrs
    out dx, al
    jmp next

power_off:
    outport 0x600, 0x34             # SLP_EN | SLP_TYP 5
halt:
    hlt
    jmp halt

reset:
    outport 0xcf9, 0x06
    jmp halt

keyboard_reset:
    outport 0x64, 0xfe
    jmp halt

triple_fault:
    lidt [rip + no_idt]
    ud2

spin:
    jmp spin

fill:
    mov rdi, START
    mov rcx, QWORDS
    movabs rax, 0x5ec2e7005ec2e700
    rep stosq
    say 'F'
    jmp next

scan:
    mov rdi, START
    mov rcx, QWORDS
    xor eax, eax
    repe scasq
    jne 1f
    say 'Z'
    jmp next
1:  say 'D'
    jmp next

# Interrupt gate 13 (#GP), 16 bytes, built here because its address is split into three.
msrs:
    lea rax, [rip + general_protection]
    lea rdi, [rip + idt + 13 * 16]
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x10    # __BOOT_CS
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    lea rax, [rip + idt]
    mov [rip + idt_base], rax
    lidt [rip + idt_pointer]
    lea rsi, [rip + msr_numbers]
2:  mov ecx, [rsi]
    add rsi, 4
    test ecx, ecx
    jz 4f
    lea r15, [rip + 3f]
    mov bl, 'W'
    mov eax, START + 1              # a page of RAM, and the enable bit
    xor edx, edx
    wrmsr
3:  say bl
    jmp 2b
4:  say 'M'
    jmp next

general_protection:
    add rsp, 8                      # the error code
    mov [rsp], r15
    mov bl, 'G'
    iretq

.data
msr_numbers:                        # asm/kvm_para.h: WALL_CLOCK, SYSTEM_TIME, and their _NEW successors
    .long 0x11, 0x12, 0x4b564d00, 0x4b564d01, 0
idt_pointer:
    .word 14 * 16 - 1
idt_base:
    .quad 0
no_idt:
    .word 0
    .quad 0
.balign 16
idt:
    .skip 14 * 16
