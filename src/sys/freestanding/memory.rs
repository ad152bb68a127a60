//! The functions of the C library that the compiler calls for slices and arrays. With `#![no_builtins]` the compiler does not turn
//! these loops into calls of themselves.

/// memcpy(3)
///
/// SAFETY: as in C: both are `length` bytes, which do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    let mut at = 0;
    while at < length {
        // SAFETY: it is less than the length.
        unsafe { *to.add(at) = *from.add(at) };
        at += 1;
    }
    to
}

/// memset(3)
///
/// SAFETY: as in C: `to` is `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, length: usize) -> *mut u8 {
    let mut at = 0;
    while at < length {
        // SAFETY: it is less than the length.
        unsafe { *to.add(at) = byte.to_le_bytes()[0] };
        at += 1;
    }
    to
}

/// memcmp(3)
///
/// SAFETY: as in C: both are `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    let mut at = 0;
    while at < length {
        // SAFETY: it is less than the length.
        let (one, other) = unsafe { (*one.add(at), *other.add(at)) };
        if one != other {
            return i32::from(one) - i32::from(other);
        }
        at += 1;
    }
    0
}

/// bcmp(3)
///
/// SAFETY: as in C: both are `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, length: usize) -> i32 {
    // SAFETY: the caller's word.
    unsafe { memcmp(one, other, length) }
}
