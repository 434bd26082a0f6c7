/// The form of a key-value cache: precision of keys and values, bound, sinks, window, rotation.
///
/// The default keeps everything in full precision.
public struct CacheForm: Sendable, Equatable, CustomStringConvertible {
    /// Stands for the model's own precision.
    public static let fullBits = 16
    /// Positions that move from full precision to codes at a time.
    public static let step = 32
    static let groupSizes = [128, 64, 32]

    /// Bits of a stored number of a key and of a value.
    public let keyBits, valueBits: Int
    /// Most positions that are kept, sinks included; nil keeps all.
    public let bound: Int?
    /// First positions that stay, in full precision, whatever happens to the others.
    public let sinks: Int
    /// Latest positions that stay in full precision; at least so many.
    public let window: Int
    /// Whether keys are quantized after a Hadamard transform of each head; nil: where it helps.
    public let rotates: Bool?

    /// Everything in full precision.
    public static let full = CacheForm()

    private init() {
        (keyBits, valueBits, bound) = (Self.fullBits, Self.fullBits, nil)
        (sinks, window, rotates) = (4, 64, nil)
    }

    /// - Throws: `ApertusError`: a value outside its range, or a bound that leaves no room.
    public init(
        keyBits: Int = fullBits, valueBits: Int? = nil, bound: Int? = nil, sinks: Int = 4,
        window: Int = 64, rotates: Bool? = nil
    ) throws {
        (self.keyBits, self.valueBits, self.bound) = (keyBits, valueBits ?? keyBits, bound)
        (self.sinks, self.window, self.rotates) = (sinks, window, rotates)
        for bits in [self.keyBits, self.valueBits] where ![2, 3, 4, 6, 8, 16].contains(bits) {
            throw ApertusError(
                .usage, "--kv-bits \(bits): expected 2, 3, 4, 6, 8 or 16 (full precision)")
        }
        guard (0 ... 1 << 24).contains(sinks), (0 ... 1 << 24).contains(window) else {
            throw ApertusError(.usage, "--kv-sink \(sinks), window \(window): expected 0 or more")
        }
        if let bound, bound < leastBound {
            throw ApertusError(
                .usage, "--max-kv \(bound): expected \(leastBound) or more, to hold \(sinks) sinks"
                    + (isQuantized ? ", a window of \(window) in full precision" : "")
                    + " and at least one block of positions")
        }
    }

    /// Whether keys or values are.
    public var isQuantized: Bool { min(keyBits, valueBits) < Self.fullBits }

    /// The smallest possible `bound`.
    public var leastBound: Int { sinks + (isQuantized ? recentRows + Self.step : 1) }

    /// Most positions, sinks not counted, that a quantized cache holds in full precision: the window,
    /// a block that is filling up, and the last block that left.
    public var recentRows: Int { window + 2 * Self.step }

    /// Positions of the ring that follows the sinks (when quantized: of codes); nil: no end.
    public var ring: Int? {
        guard let bound else { return nil }
        return isQuantized ? (bound - sinks - recentRows) / Self.step * Self.step : bound - sinks
    }

    /// How many of the first `positions`, counted after the sinks, are quantized by then.
    public func flushed(_ positions: Int) -> Int {
        isQuantized ? max(0, (positions - sinks - window) / Self.step * Self.step) : 0
    }

    /// Numbers that share a scale: the widest group that MLX has and that divides a head.
    ///
    /// - Throws: `ApertusError` if none does.
    public static func groupSize(headDim: Int) throws -> Int {
        if let size = groupSizes.first(where: { headDim % $0 == 0 }) { return size }
        throw ApertusError(
            .usage,
            "--kv-bits: head_dim \(headDim) does not divide into groups of 32, 64 or 128; "
                + "use --kv-bits 16")
    }

    /// Refuse what cannot be done with heads of this width.
    ///
    /// - Throws: `ApertusError`: the width does not divide into groups, or cannot be rotated.
    public func requireFit(headDim: Int) throws {
        if isQuantized { _ = try Self.groupSize(headDim: headDim) }
        if rotates == true, headDim & (headDim - 1) != 0 {
            throw ApertusError(.usage, "--kv-rotate: head_dim \(headDim) is not a power of two")
        }
    }

    /// The same form with another bound.
    func bounded(_ bound: Int) throws -> CacheForm {
        try CacheForm(
            keyBits: keyBits, valueBits: valueBits, bound: bound, sinks: sinks, window: window,
            rotates: rotates)
    }

    /// As a prompt cache holds it, by Python's names.
    package var json: String {
        let bound = bound.map(String.init) ?? "null"
        let rotates = rotates.map { "\($0)" } ?? "null"
        return #"{"key_bits": \#(keyBits), "value_bits": \#(valueBits), "bound": \#(bound), "#
            + #""sinks": \#(sinks), "window": \#(window), "rotate": \#(rotates)}"#
    }

    public var description: String {
        let form =
            !isQuantized
            ? "full precision"
            : keyBits == valueBits
                ? "\(keyBits) bits" : "keys \(keyBits) bits, values \(valueBits) bits"
        return bound.map { "\(form), at most \($0) positions" } ?? form
    }
}
