"""From a C type to a numpy dtype, by the BTF of the object: a layout is written down once, in bpf/."""

import numpy as np

from fastrecv._bpf.libbpf cimport (
    BTF_INT_SIGNED,
    BTF_KIND_ARRAY,
    BTF_KIND_CONST,
    BTF_KIND_DATASEC,
    BTF_KIND_ENUM,
    BTF_KIND_INT,
    BTF_KIND_STRUCT,
    BTF_KIND_TYPEDEF,
    BTF_KIND_VAR,
    BTF_KIND_VOLATILE,
    btf,
    btf__find_by_name_kind,
    btf__name_by_offset,
    btf__type_by_id,
    btf_array,
    btf_int_encoding,
    btf_kind,
    btf_member_bit_offset,
    btf_member_bitfield_size,
    btf_members,
    btf_type,
    btf_var_secinfos,
    btf_vlen,
    get_array,
)
from libc.stdint cimport int32_t, uint32_t


cdef object dtype_of(const btf *types, uint32_t id):
    """The numpy dtype of a BTF type; None for what numpy cannot say (unions, pointers, bit fields)."""
    cdef const btf_type *t = btf__type_by_id(types, id)
    cdef uint32_t kind, i
    cdef const btf_array *array
    order = "="
    while t != NULL and btf_kind(t) in (BTF_KIND_TYPEDEF, BTF_KIND_VOLATILE, BTF_KIND_CONST, BTF_KIND_VAR):
        if btf_kind(t) == BTF_KIND_TYPEDEF and btf__name_by_offset(types, t.name_off).startswith(b"__be"):
            order = ">"
        t = btf__type_by_id(types, t.type)
    if t == NULL:
        return None
    kind = btf_kind(t)
    if kind == BTF_KIND_INT and t.size > 8:
        return None
    if kind == BTF_KIND_INT:
        return np.dtype(f"{order}{'i' if btf_int_encoding(t) & BTF_INT_SIGNED else 'u'}{t.size}")
    if kind == BTF_KIND_ENUM:
        return np.dtype(f"u{t.size}")
    if kind == BTF_KIND_ARRAY:
        array = get_array(t)
        element = dtype_of(types, array.type)
        return None if element is None else np.dtype((element, (array.nelems,)))
    names, formats, offsets = [], [], []
    if kind == BTF_KIND_STRUCT:
        for i in range(btf_vlen(t)):
            if btf_member_bitfield_size(t, i):
                return None
            names.append(btf__name_by_offset(types, btf_members(t)[i].name_off).decode() or f"_{i}")
            formats.append(dtype_of(types, btf_members(t)[i].type))
            offsets.append(btf_member_bit_offset(t, i) // 8)
    elif kind == BTF_KIND_DATASEC:
        for i in range(btf_vlen(t)):
            name = btf__name_by_offset(types, btf__type_by_id(types, btf_var_secinfos(t)[i].type).name_off)
            names.append(name.decode())
            formats.append(dtype_of(types, btf_var_secinfos(t)[i].type) or np.dtype(f"V{btf_var_secinfos(t)[i].size}"))
            offsets.append(btf_var_secinfos(t)[i].offset)
    else:
        return None
    if None in formats:
        return None
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": t.size})


cdef object section_type(const btf *types, str section):
    """The dtype of a section of global variables, one field a variable; None where there is no BTF for it."""
    cdef bytes name = section.encode()
    cdef int32_t id
    if types == NULL:
        return None
    id = btf__find_by_name_kind(types, name, BTF_KIND_DATASEC)
    return dtype_of(types, <uint32_t>id) if id > 0 else None


cdef object struct_type(const btf *types, str name):
    """The dtype of `struct name`; None where the object does not describe it, or numpy cannot say it."""
    cdef bytes encoded = name.encode()
    cdef int32_t id
    if types == NULL:
        return None
    id = btf__find_by_name_kind(types, encoded, BTF_KIND_STRUCT)
    return dtype_of(types, <uint32_t>id) if id > 0 else None
