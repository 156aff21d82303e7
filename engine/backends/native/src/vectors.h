// Goes through runs of elements of any length, sixteen at a time.
#pragma once
#include "simd.h"

namespace REEF_ISA {

constexpr int kLanes = 16;

// Calls body(column, n) for columns [begin, end), with n = 16 except at the very end.
template <class Body>
inline void for_vectors(int begin, int end, Body body) {
    int column = begin;
    for (; column + kLanes <= end; column += kLanes) body(column, kLanes);
    if (column < end) body(column, end - column);
}

template <class T>
inline F16 load_upto(const T* p, int n) {
    return n == kLanes ? load(p) : load(p, n);
}

template <class T>
inline void store_upto(T* p, F16 a, int n) {
    if (n == kLanes) store(p, a);
    else store(p, a, n);
}

}  // namespace REEF_ISA
