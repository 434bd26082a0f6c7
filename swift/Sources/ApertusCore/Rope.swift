import Foundation

/// Rotary position embedding: its base and how it is scaled.
public struct Rope: Sendable, Equatable {
    /// How waves are scaled; `default`: not at all.
    public enum Kind: String, Sendable, CaseIterable { case `default`, linear, llama3 }

    public var theta: Double
    public var kind = Kind.default
    /// Of `linear` and `llama3`: by what waves are stretched.
    public var factor = 1.0
    /// Of `llama3`: in turns within `originalMaxPositions`.
    public var lowFreqFactor = 1.0
    public var highFreqFactor = 4.0
    public var originalMaxPositions = 8192

    /// No released model has more positions.
    static let longestContext = 1 << 24

    /// Positions per radian of each of the `headDim / 2` rotations, what MLX calls `freqs`.
    ///
    /// Computed in double precision and rounded once.
    public func wavelengths(headDim: Int) -> [Float] {
        (0 ..< max(headDim, 0) / 2).map { index in
            let wave = pow(theta, Double(2 * index) / Double(headDim))
            switch kind {
            case .default: return Float(wave)
            case .linear: return Float(wave * factor)
            case .llama3:
                let turns = Double(originalMaxPositions) / (2 * .pi * wave)
                let share = (turns - lowFreqFactor) / (highFreqFactor - lowFreqFactor)
                let kept = min(max(share, 0), 1)
                return Float(wave / ((1 - kept) / factor + kept))
            }
        }
    }
}

extension Rope {
    private static let flatKeys = [
        "rope_type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    ]

    /// Rope in any spelling; where there are several they must agree.
    ///
    /// transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`, and
    /// AutoRound's MLX export dissolves `rope_parameters` into the keys of the model.
    init(_ keys: KeyReader, _ name: String) throws {
        let theta = try keys.optionalNumber("rope_theta", above: 1, to: 1e12)
        var blocks: [(key: String, block: JSON)] = []
        if let new = try keys.object("rope_parameters") { blocks.append(("rope_parameters", new)) }
        if let old = try keys.object("rope_scaling") { blocks.append(("rope_scaling", old)) }
        if keys.has("rope_type") {
            let flat = Self.flatKeys.compactMap { key in
                keys.value(key).map { JSON.Member(key: Array(key.utf8), value: $0) }
            }
            keys.ignore(Self.flatKeys)
            blocks.append(("rope_type", .object(flat)))
        }
        if blocks.isEmpty { blocks = [("rope_scaling", .object([]))] }
        let readings = try blocks.map { try Rope(block: $0.block, theta, "\(name): \($0.key)") }
        let (first, rope) = (blocks[0].key, readings[0])
        for (other, reading) in zip(blocks, readings) where reading != rope {
            throw ApertusError(.rejected, "\(name): \(first) and \(other.key) disagree")
        }
        if let theta, rope.theta != theta {
            throw ApertusError(
                .rejected,
                "\(name): rope_theta \(theta) and \(first).rope_theta \(rope.theta) disagree")
        }
        self = rope
    }

    private init(block: JSON, _ flatTheta: Double?, _ name: String) throws {
        let keys = KeyReader(block, name)
        let written = try keys.eitherText("rope_type", "type") ?? "default"
        guard let kind = Kind(rawValue: written) else {
            throw ApertusError(
                .rejected,
                "\(name): rope_type: \(quoted(written.cut(60))) is not implemented; "
                    + "Apertus uses default, linear or llama3")
        }
        let ownTheta = try keys.optionalNumber("rope_theta", above: 1, to: 1e12)
        guard let theta = ownTheta ?? flatTheta else {
            throw ApertusError(
                .rejected, "\(name): rope_theta: missing; the rotary base cannot be guessed")
        }
        self.init(theta: theta, kind: kind)
        func factor(_ key: String) throws -> Double { try keys.number(key, above: 1e-3, to: 1e6) }
        // transformers keeps a factor of 1 beside the default type.
        if kind == .default, try keys.optionalNumber("factor", above: 1e-3, to: 1e6) ?? 1 != 1 {
            throw ApertusError(.rejected, "\(name): factor: has no meaning without a rope_type")
        }
        if try keys.optionalNumber("partial_rotary_factor", above: 0, to: 1) ?? 1 != 1 {
            throw ApertusError(
                .rejected, "\(name): partial_rotary_factor: only 1 is implemented")
        }
        if kind != .default { self.factor = try factor("factor") }
        if kind == .llama3 {
            lowFreqFactor = try factor("low_freq_factor")
            highFreqFactor = try factor("high_freq_factor")
            originalMaxPositions = try keys.integer(
                "original_max_position_embeddings", 1 ... Self.longestContext)
            if highFreqFactor <= lowFreqFactor {
                throw ApertusError(
                    .rejected, "\(name): high_freq_factor: must exceed low_freq_factor")
            }
        } else {  // the other types scale by nothing that depends on it
            keys.ignore(["original_max_position_embeddings"])
        }
        try keys.refuseUnread()
    }
}
