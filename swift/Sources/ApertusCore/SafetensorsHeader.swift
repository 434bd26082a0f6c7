import Foundation

/// Where one tensor lies: `byteCount` bytes at `offset` of `file`.
public struct TensorInfo: Sendable, Equatable {
    public let name: String
    /// As safetensors writes it: `BF16`, `F32`, `U32` …
    public let dtype: String
    public let shape: [Int]
    /// The name of a file in the model's folder.
    public let file: String
    public let offset: Int
    public let byteCount: Int
}

/// The header of a safetensors file as checked values.
///
/// 8 bytes of little-endian length, a JSON object of `name -> {dtype, shape, data_offsets}`, then the
/// data without holes or overlaps (the safetensors README is the specification). MLX's own reader
/// accepts negative sizes, overlaps and offsets that wrap around, so no array is read before this.
public enum SafetensorsHeader {
    static let mostBytes = 16 << 20
    static let mostTensors = 100_000
    static let longestName = 300
    static let bytesOf = [
        "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
        "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
    ]

    /// The tensors of a file, in the order of their data; reads nothing but the header.
    ///
    /// - Throws: `ApertusError` that names file and tensor: damaged, hostile, no safetensors file.
    public static func read(_ url: URL) throws -> [TensorInfo] {
        let file = try ModelFile(url)
        let start = try file.read(count: min(file.size, 24))
        try ModelFile.refusePointer(start, file.path)
        let length = try length(start, file.size, file.path)
        let header = try file.read(at: 8, count: length)
        return try parse(header, file.size, file: url.lastPathComponent, name: file.path)
    }

    /// The texts under `__metadata__` of a file whose header `read` accepts; none where it has none.
    package static func metadata(_ url: URL) throws -> [String: String] {
        let file = try ModelFile(url)
        let start = try file.read(count: min(file.size, 8))
        let header = try file.read(at: 8, count: length(start, file.size, file.path))
        let said = try parseObject(header, name: "\(file.path): header")["__metadata__"]
        let texts = (said?.members ?? []).map {
            (String(decoding: $0.key, as: UTF8.self), $0.value.text ?? "")
        }
        return Dictionary(texts, uniquingKeysWith: { $1 })
    }

    static func length(_ start: Data, _ fileSize: Int, _ name: String) throws -> Int {
        guard fileSize >= 8, start.count >= 8 else {
            throw ApertusError(
                .rejected, "\(name): \(fileSize) bytes is too short for a safetensors file")
        }
        let declared = start.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard declared <= mostBytes else {
            throw ApertusError(
                .rejected, "\(name): declares a header of \(declared) bytes; not a safetensors file")
        }
        guard declared >= 2, 8 + Int(declared) <= fileSize else {
            throw ApertusError(
                .rejected,
                "\(name): declares a header of \(declared) bytes in a file of \(fileSize): truncated? "
                    + "Fetch the file again")
        }
        return Int(declared)
    }

    /// The tensors that the header of a file of `fileSize` bytes describes, in the order of their
    /// data.
    static func parse(_ header: Data, _ fileSize: Int, file: String, name: String) throws -> [TensorInfo] {
        guard header.first == UInt8(ascii: "{") else {
            throw ApertusError(
                .rejected, "\(name): the header is not a JSON object; not a safetensors file")
        }
        let entries = try parseObject(header, name: "\(name): header").members ?? []
        let metadata = Array("__metadata__".utf8)
        var tensors: [TensorInfo] = []
        for entry in entries where entry.key != metadata {
            let key = String(decoding: entry.key, as: UTF8.self)
            let place = "\(name): tensor \(quoted(key.cut(80)))"
            tensors.append(try tensor(key, entry.value, 8 + header.count, file, place))
        }
        guard tensors.count <= mostTensors else {
            throw ApertusError(
                .rejected, "\(name): \(tensors.count) tensors are more than any Apertus has")
        }
        if let said = entries.first(where: { $0.key == metadata })?.value, !said.isNull {
            guard said.members?.allSatisfy({ $0.value.bytes != nil }) ?? false else {
                throw ApertusError(.rejected, "\(name): __metadata__ holds more than texts")
            }
        }
        tensors.sort { ($0.offset, $0.byteCount) < ($1.offset, $1.byteCount) }
        var position = 8 + header.count
        for tensor in tensors {
            guard tensor.offset == position else {
                let kind = tensor.offset < position ? "overlaps another" : "leaves a hole before it"
                throw ApertusError(
                    .rejected, "\(name): tensor \(quoted(tensor.name.cut(80))) \(kind)")
            }
            position += tensor.byteCount
        }
        guard position == fileSize else {
            let problem = position > fileSize ? "truncated" : "followed by other bytes"
            throw ApertusError(
                .rejected,
                "\(name): holds \(fileSize) bytes where its header describes \(position): \(problem); "
                    + "fetch the file again")
        }
        return tensors
    }

    private static func tensor(
        _ key: String, _ entry: JSON, _ dataStart: Int, _ file: String, _ name: String
    ) throws -> TensorInfo {
        guard key.unicodeScalars.count <= longestName else {
            throw ApertusError(
                .rejected, "\(name): the name is longer than \(longestName) characters")
        }
        let members = Set((entry.members ?? []).map { String(decoding: $0.key, as: UTF8.self) })
        guard members == ["dtype", "shape", "data_offsets"] else {
            throw ApertusError(
                .rejected, "\(name): expected exactly dtype, shape and data_offsets")
        }
        guard let dtype = entry["dtype"]?.text, let width = bytesOf[dtype] else {
            let shown = quoted((entry["dtype"]?.text ?? entry["dtype"]?.shown ?? "").cut(40))
            throw ApertusError(.rejected, "\(name): dtype \(shown) is not supported")
        }
        guard let shape = sizes(entry["shape"], below: 1 << 31) else {
            throw ApertusError(
                .rejected,
                "\(name): shape \((entry["shape"]?.shown ?? "").cut(60)) is not a list of sizes "
                    + "below 2^31")
        }
        // Below 2^62, so that sums cannot overflow.
        guard let offsets = sizes(entry["data_offsets"], below: 1 << 62), offsets.count == 2 else {
            throw ApertusError(
                .rejected,
                "\(name): data_offsets \((entry["data_offsets"]?.shown ?? "").cut(60)) are not two "
                    + "offsets")
        }
        let byteCount = shape.contains(0) ? 0 : product(shape + [width])
        guard let byteCount, offsets[1] - offsets[0] == byteCount else {
            throw ApertusError(
                .rejected,
                "\(name): \(dtype) \(shape) takes \(byteCount.map(String.init) ?? "too many") bytes, "
                    + "data_offsets give \(offsets[1] - offsets[0])")
        }
        return TensorInfo(
            name: key, dtype: dtype, shape: shape, file: file, offset: dataStart + offsets[0],
            byteCount: byteCount)
    }

    private static func sizes(_ list: JSON?, below limit: Int) -> [Int]? {
        guard let items = list?.items else { return nil }
        let sizes = items.compactMap(\.int).filter { $0 >= 0 && $0 < limit }
        return sizes.count == items.count ? sizes : nil
    }

    private static func product(_ factors: [Int]) -> Int? {
        var total = 1
        for factor in factors {
            let (next, overflow) = total.multipliedReportingOverflow(by: factor)
            if overflow { return nil }
            total = next
        }
        return total
    }
}
