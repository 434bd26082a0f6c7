/// One quantized format of a weight matrix `[out, in]`, grouped along `in`.
public struct QuantizedFormat: Sendable, Equatable, CustomStringConvertible {
    /// Affine weights are `scale * code + bias` in each group; the floating-point modes hold one
    /// shared 8-bit scale and no bias.
    public enum Mode: String, Sendable, CaseIterable { case affine, mxfp4, mxfp8, nvfp4 }

    public let bits: Int
    /// In weights.
    public let groupSize: Int
    public let mode: Mode

    /// - Throws: `ApertusError` if MLX has no such format; `name` is what it calls the place.
    public init(bits: Int, groupSize: Int, mode: Mode = .affine, name: String = "quantization") throws {
        (self.bits, self.groupSize, self.mode) = (bits, groupSize, mode)
        if let (ownBits, ownSize) = mode.only {
            guard (bits, groupSize) == (ownBits, ownSize) else {
                throw ApertusError(
                    .rejected, "\(name): \(mode) has \(ownBits) bits and groups of \(ownSize)")
            }
        } else if ![2, 3, 4, 5, 6, 8].contains(bits) {
            throw ApertusError(
                .rejected, "\(name): \(bits) bits: affine weights have 2, 3, 4, 5, 6 or 8")
        } else if ![32, 64, 128].contains(groupSize) {
            throw ApertusError(
                .rejected,
                "\(name): group size \(groupSize): affine groups have 32, 64 or 128 weights")
        }
    }

    /// Whether each group stores a bias beside its scale.
    public var hasBiases: Bool { mode == .affine }

    /// Whether a row of `columns` weights divides into whole groups and whole 32-bit words.
    public func fits(_ columns: Int) -> Bool {
        columns % groupSize == 0 && columns * bits % 32 == 0
    }

    /// Number of 32-bit words that hold a row of `columns` codes.
    public func packedColumns(_ columns: Int) -> Int { columns * bits / 32 }

    /// Number of groups in a row of `columns` weights.
    public func groups(_ columns: Int) -> Int { columns / groupSize }

    /// Bytes of codes, scales and biases of a matrix; `scaleBytes` for each affine scale.
    public func weightBytes(rows: Int, columns: Int, scaleBytes: Int) -> Int {
        let perGroup = hasBiases ? 2 * scaleBytes : 1
        return rows * packedColumns(columns) * 4 + rows * groups(columns) * perGroup
    }

    public var description: String {
        mode == .affine ? "\(bits) bits, groups of \(groupSize)" : mode.rawValue
    }
}

extension QuantizedFormat.Mode {
    /// Bits and group size of the floating-point modes, which come in one form each.
    var only: (bits: Int, groupSize: Int)? {
        switch self {
        case .affine: nil
        case .mxfp4: (4, 32)
        case .mxfp8: (8, 32)
        case .nvfp4: (4, 16)
        }
    }
}

/// The `quantization` block of an MLX folder: one default and exceptions for modules.
public struct Quantization: Sendable, Equatable {
    public let standard: QuantizedFormat
    /// Module path -> its format, or nil where it stays unquantized.
    public let exceptions: [String: QuantizedFormat?]

    /// - Parameter exceptions: module path -> its format, or nil where it stays unquantized.
    public init(_ standard: QuantizedFormat, exceptions: [String: QuantizedFormat?] = [:]) {
        (self.standard, self.exceptions) = (standard, exceptions)
    }

    /// The format of the module at `path`; nil where the block says that it stays unquantized.
    ///
    /// A module without scales is unquantized, whatever this says.
    public func format(of path: String) -> QuantizedFormat? {
        exceptions[path] ?? standard
    }
}

/// What a config says of how its weights are quantized.
enum WrittenQuantization: Equatable {
    case none
    case mlx(Quantization)
    /// Another format, by its name.
    case foreign(String)

    private static let extras: Set = ["quant_method", "linear_class", "quantization_mode"]
    /// Methods whose weights `apertus-mlx convert` reads.
    static let convertible = ["compressed-tensors", "gptq", "awq", "auto-round", "fp8"]
    /// Methods that compress plain weights when they are loaded: their block may stand beside such.
    static let atLoading = ["bitsandbytes"]

    /// MLX's `quantization` block, or the block of another format under `quantization_config`.
    init(_ keys: KeyReader, _ name: String) throws {
        let block = try keys.object("quantization")
        var other = try keys.object("quantization_config")
        if let block, let found = other {
            if Self.describesMLX(block, found) {
                other = nil
            } else if !block.means(found) {
                throw ApertusError(
                    .rejected, "\(name): quantization and quantization_config disagree")
            }
        }
        if block == nil, let other, let method = Self.foreignMethod(other) {
            self = .foreign(method)
        } else if let block = block ?? other {
            self = .mlx(try Quantization(block, "\(name): quantization"))
        } else {
            self = .none
        }
    }

    private static func foreignMethod(_ block: JSON) -> String? {
        guard let method = block["quant_method"], !method.isNull else { return nil }
        let name = method.text ?? method.shown
        let own = Set(
            (block.members ?? []).filter { $0.value.members == nil && $0.value.flag == nil }
                .map { String(decoding: $0.key, as: UTF8.self) })
        let known = extras.union(["bits", "group_size", "mode"])
        let isMLX =
            !(convertible + atLoading + ["intel/auto-round"]).contains(name)
            && own.isSubset(of: known) && own.isSuperset(of: ["bits", "group_size"])
        if isMLX { return nil }
        return name.hasPrefix("intel/") ? String(name.dropFirst(6)) : name
    }

    /// Whether `other` says in AutoRound's words that the weights are as MLX's `block` says.
    private static func describesMLX(_ block: JSON, _ other: JSON) -> Bool {
        other["packing_format"]?.text == "mlx"
            && ["bits", "group_size"].allSatisfy { key in
                let said = other[key] ?? .null
                return said.isNull || said.means(block[key] ?? .null)
            }
    }

    /// Refuse what has to be converted first.
    ///
    /// - Returns: the method of a block that may be left over beside plain weights.
    func refuseForeign(_ name: String) throws -> String? {
        guard case .foreign(let method) = self else { return nil }
        if Self.atLoading.contains(method) { return method }
        throw Self.refusal(of: method, name)
    }

    static func refusal(of method: String, _ name: String) -> ApertusError {
        let shown = quoted(method.cut(40))
        if convertible.contains(method) {
            return ApertusError(
                .rejected,
                "\(name): weights are quantized by \(shown); convert them first: apertus-mlx convert")
        }
        return ApertusError(
            .rejected,
            "\(name): quantized by \(shown), which is not read; use the checkpoint that it was made "
                + "from (of a fine-tune: merged in 16 bits), or a compressed-tensors, GPTQ, AWQ or "
                + "AutoRound version")
    }
}

extension Quantization {
    fileprivate init(_ block: JSON, _ name: String) throws {
        let keys = KeyReader(block, name)
        let standard = try QuantizedFormat(keys, name)
        keys.ignore(["quant_method", "linear_class", "quantization_mode"])
        var exceptions: [String: QuantizedFormat?] = [:]
        for member in block.members ?? [] {
            let path = String(decoding: member.key, as: UTF8.self)
            if let flag = member.value.flag {
                exceptions.updateValue(flag ? standard : nil, forKey: path)
            } else if member.value.members != nil {
                let place = "\(name).\(path.cut(80))"
                let inner = KeyReader(member.value, place)
                exceptions.updateValue(try QuantizedFormat(inner, place), forKey: path)
                try inner.refuseUnread()
            } else {
                continue
            }
            keys.ignore([path])
        }
        try keys.refuseUnread()
        self.init(standard, exceptions: exceptions)
    }
}

extension QuantizedFormat {
    /// One format; as in MLX, bits and group size that are absent or null are the mode's own.
    fileprivate init(_ keys: KeyReader, _ name: String) throws {
        let written = try keys.optionalText("mode") ?? ""
        let mode = Mode(rawValue: written.isEmpty ? "affine" : written)
        let (bits, groupSize) = mode?.only ?? (4, 64)
        let writtenBits = try keys.optionalInteger("bits", 1 ... 64)
        let writtenSize = try keys.optionalInteger("group_size", 1 ... 1 << 20)
        guard let mode else {
            throw ApertusError(
                .rejected,
                "\(name): mode \(quoted(written.cut(60))): expected affine, mxfp4, mxfp8, nvfp4")
        }
        try self.init(
            bits: writtenBits ?? bits, groupSize: writtenSize ?? groupSize, mode: mode, name: name)
    }
}
